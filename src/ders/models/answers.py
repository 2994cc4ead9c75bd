"""What a model thinks of the answers that stand in a batch.

B batch, L tokens, P positions whose next token is an answer's in at least one row, V vocabulary.
"""

from torch import Tensor, nn


def answer_logits(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits (B, P, V) where answers stand, and the tokens wanted there (B, P), negative where a row has none.

    A large vocabulary's logits cost as much time as many layers, and more memory: none are computed elsewhere.

    Args:
        batch: a model's inputs, and `labels` (B, L), negative where there is no answer.
    """
    inputs = {key: tensor for key, tensor in batch.items() if key != "labels"}
    wanted_BL = batch["labels"][:, 1:]
    positions = (wanted_BL >= 0).any(dim=0).nonzero().squeeze(1)
    logits_BPV: Tensor = model(**inputs, use_cache=False, logits_to_keep=positions).logits
    return logits_BPV, wanted_BL[:, positions]
