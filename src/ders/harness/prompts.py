"""Which prompt a model is asked in."""

from torch import nn

from ders.compression.compress import section_of
from ders.data.conversation import PROMPTS, Template, named_prompt


def prompt_for(model: nn.Module, prompt: str = "auto") -> Template:
    """The prompt of that name, or the one that a model was trained in ("auto").

    A dense model's folder records no prompt: "auto" is vicuna then. What a folder records is only looked up among our
    own prompts.

    Raises:
        ValueError: there is no such prompt, or the recorded one is not known here.
    """
    if prompt != "auto":
        return named_prompt(prompt)
    recorded = (section_of(model).get("provenance") or {}).get("prompt")
    if recorded is None:
        return named_prompt("vicuna")
    for template in PROMPTS.values():
        if vars(template) == recorded:
            return template
    raise ValueError(f"the model was trained in a prompt that is not known here: choose prompt={'|'.join(PROMPTS)}")
