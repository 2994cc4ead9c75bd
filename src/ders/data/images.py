"""Pictures on disk: where they may lie, what is refused, what is merely odd."""

from pathlib import Path

from PIL import Image

from ders.data.faults import RowError

# Larger pictures are taken for decompression bombs.
MAX_PIXELS = 89_478_485


def resolve_image(image: str, image_root: Path) -> Path:
    """The absolute path of a row's image.

    Raises:
        RowError: the path leaves the image root, symbolic links followed.
    """
    root = image_root.resolve()
    path = (root / image).resolve()
    if not path.is_relative_to(root):
        raise RowError("outside_root", f"{image}: the path leaves the image root {root}")
    return path


def open_image(path: Path) -> Image.Image:
    """A decoded RGB picture; refuses decompression bombs."""
    return _decode(path)[0]


def read_image(image: str, image_root: Path) -> Image.Image:
    """A row's picture, decoded to RGB.

    Raises:
        RowError: it is missing, unreadable, outside the image root or a decompression bomb.
    """
    return _read(image, image_root)[0]


def inspect_image(image: str, image_root: Path | None) -> tuple[RowError | None, str | None]:
    """(what makes the picture unusable, what is odd about it though it can be used); each None where there is nothing.

    Odd is a file of another format than its name says, as the GIFs named jpg in LLaVA's OCR-VQA.
    """
    if image_root is None:
        return RowError("no_image_root", "has an image, but data.images (the image root) is not set"), None
    try:
        found = _read(image, image_root)[1]
    except RowError as fault:
        return fault, None
    suffix = Path(image).suffix.lower()
    expected = Image.registered_extensions().get(suffix)
    return None, f"{found} named {suffix}" if expected is not None and expected != found else None


def _read(image: str, image_root: Path) -> tuple[Image.Image, str | None]:
    path = resolve_image(image, image_root)
    if not path.is_file():
        raise RowError("missing_image", f"{image}: missing below {image_root}")
    try:
        return _decode(path)
    except Image.DecompressionBombError as error:
        raise RowError("decompression_bomb", f"{image}: refused as a decompression bomb ({error})") from error
    except Exception as error:  # every decoder of Pillow raises its own on a damaged file
        raise RowError("corrupt_image", f"{image}: unreadable ({error})") from error


def _decode(path: Path) -> tuple[Image.Image, str | None]:
    # Pillow refuses only what is twice as large, and warns otherwise.
    with Image.open(path) as image:
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError(f"{image.width}×{image.height} pixels")
        return image.convert("RGB"), image.format
