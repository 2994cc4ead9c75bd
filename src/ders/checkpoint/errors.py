class ModelFolderError(ValueError):
    """A folder that does not hold a whole model, or not the one it should; the message names the file."""
