"""Every YAML is composed, and instantiated where it needs neither network nor accelerator."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from ders.cli.app import UserError, prepare_hydra, to_plain
from ders.cli.build import check, instantiate, trainer_factory
from ders.cli.dials import dials_by_owner
from ders.cli.jobs import job_config
from ders.cli.sweeper import expand
from ders.reporting.identity import differences, identity, run_folder

CONF = ROOT / "conf"


@pytest.fixture(autouse=True)
def hydra_root() -> None:
    prepare_hydra()


def composed(*overrides: str, name: str = "train") -> Any:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, overrides=list(overrides))


def choices(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def test_no_yaml_is_forgotten() -> None:
    groups = {file.parent.relative_to(CONF).as_posix() for file in CONF.rglob("*.yaml")}
    assert groups == {
        ".", "method", "compression", "model", "data", "stage", "trainer", "logger", "optimizer", "schedule",
        "upcycling", "recipe", "evaluation", "hydra/sweeper", "hydra/launcher", "hparams_search",
    }  # fmt: skip


@pytest.mark.parametrize("method", choices("method"))
def test_methods(method: str) -> None:
    config = composed(f"method={method}")
    assert config.method.name == method
    check(config)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=tiny_lm", "data=digits_text"],
        ["data=easy_vqa"],
        ["data=llava_files", "data.train=x.json", "data.image_size=32", "data.patch_size=16"],
        ["logger=wandb"],
        *([f"upcycling={name}"] for name in ("moe_llava", "moe_llava_original", "med_moe", "coder_moe")),
        ["upcycling=med_moe", "extended=true"],
        ["upcycling=med_moe", "method=vanilla", "compression=svd", "extended=true"],
        ["schedule@stage.moe.schedule=linear"],
        ["optimizer@stage.moe.optimizer=adamw", "stage.moe.optimizer.lr=1e-3"],
        *([f"model.text.model_type={family}"] for family in ("qwen2", "stablelm", "phi", "phi3")),
        *([f"trainable={trainable}"] for trainable in ("paper", "frozen_shared", "adapter", "all")),
        *([f"upcycling.layers={layers}"] for layers in ("all", "first_half", "second_half", "[1,3]")),
    ],
)
def test_choices_work(overrides: list[str]) -> None:
    check(composed(*overrides))


@pytest.mark.parametrize("trainer", choices("trainer"))
def test_trainers(trainer: str) -> None:
    config = composed(f"trainer={trainer}")
    if trainer == "gpu" and not torch.cuda.is_available():
        assert config.trainer.accelerator == "gpu"
        return
    config.trainer.devices = 1
    assert trainer_factory(config)(max_steps=1, logger=False).max_steps == 1


def test_a_gpu_trainer_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch sees no GPU here"):
        check(composed("trainer=gpu"))


@pytest.mark.parametrize("logger", choices("logger"))
def test_loggers(logger: str, tmp_path: Path) -> None:
    config = composed(f"logger={logger}")
    built = {name: instantiate(node)(folder=tmp_path, name="run", start=0) for name, node in config.logger.items()}
    assert set(built) == set(logger.split("_")) - {"csv"}
    assert not list(tmp_path.iterdir())  # nothing starts before it is used
    assert run_folder(to_plain(config), ROOT) == run_folder(to_plain(composed()), ROOT)


@pytest.mark.parametrize("evaluation", choices("evaluation"))
def test_evaluations(evaluation: str) -> None:
    data = ["evaluation.data=x.jsonl"] if evaluation.endswith("_plus") else []
    built = instantiate(composed("checkpoint=x", f"evaluation={evaluation}", *data, name="eval").evaluation)
    assert built.name == evaluation


@pytest.mark.parametrize("launcher", choices("hydra/launcher"))
def test_launchers(launcher: str) -> None:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", overrides=[f"hydra/launcher={launcher}"], return_hydra_config=True)
    written = yaml.safe_load((CONF / "hydra" / "launcher" / f"{launcher}.yaml").read_text())
    composed_ = OmegaConf.to_container(config.hydra.launcher)
    # Every setting of the plug-in is written down, but for those that its schema alone holds.
    assert {k: v for k, v in composed_.items() if k in written} == written
    assert set(composed_) - set(written) <= {"backend"}
    assert "submitit_folder" not in written or written["submitit_folder"].startswith("${hydra.sweep.dir}/")


def test_slurm_is_told_when_to_warn_and_never_to_requeue(tmp_path: Path) -> None:
    from submitit.slurm.slurm import _make_sbatch_string

    written = yaml.safe_load((CONF / "hydra" / "launcher" / "submitit_slurm.yaml").read_text())
    ours = ("signal_delay_s", "additional_parameters", "array_parallelism")
    script = _make_sbatch_string("true", str(tmp_path), map_count=3, **{key: written[key] for key in ours})
    assert {"#SBATCH --no-requeue", "#SBATCH --signal=USR2@180", "#SBATCH --array=0-2%3"} <= set(script.splitlines())
    assert written["max_num_timeout"] == 0


@pytest.mark.parametrize("search", choices("hparams_search"))
def test_a_search_changes_no_run(search: str) -> None:
    assert to_plain(composed(f"hparams_search={search}")) == to_plain(composed())


@pytest.mark.parametrize("claim", sorted(file.stem for file in (ROOT / "experiments").glob("*.yaml")))
def test_claims(claim: str) -> None:
    text = (ROOT / "experiments" / f"{claim}.yaml").read_text()
    assert f"# python train.py experiments={claim}\n" in text
    sweeper = yaml.safe_load(text)["hydra"]["sweeper"]
    seeds = {len(expand(sweeper["runs"], [f"seed={seed}"], sweeper.get("common", ""))) for seed in (0, 1)}
    jobs = expand(sweeper["runs"], ["seed=0"], sweeper.get("common", ""))
    assert seeds == {len(jobs)}
    folders = set()
    for job in jobs:
        config = job_config(job)
        instantiate(config.stage.moe)
        folders.add(run_folder(to_plain(config), ROOT))
    assert len(folders) == len(jobs)
    assert to_plain(composed(f"experiments={claim}")) == to_plain(composed())  # a claim changes no run


@pytest.mark.parametrize(
    "file",
    [
        f
        for g in (
            "method",
            "model",
            "data",
            "trainer",
            "logger",
            "recipe",
            "upcycling",
            "hydra/launcher",
            "hparams_search",
        )
        for f in sorted((CONF / g).iterdir())
    ],
)
def test_the_command_of_a_file_works(file: Path) -> None:
    if file.stem in ("csv", "none"):
        return
    command = re.search(r"^# python (?:train|scripts/plan).py (.*?)(?:  |$)", file.read_text(), re.MULTILINE)
    assert command, file
    arguments = shlex.split(command[1])
    if "-m" in arguments:
        arguments.remove("-m")
        arguments = expand([""], arguments)[0]
    assert f"{file.parent.relative_to(CONF).as_posix()}={file.stem}" in arguments
    if "scripts/plan.py" in command[0]:
        with pytest.raises(UserError, match="has one size, paper"):
            check(composed(*arguments))
    elif file.stem != "gpu":
        check(composed(*arguments))


@pytest.mark.parametrize("compression", choices("compression"))
def test_compressions(compression: str) -> None:
    text = (CONF / "compression" / f"{compression}.yaml").read_text()
    command = re.search(r"^# python scripts/compress.py (.*)$", text, re.MULTILINE)
    assert command, compression
    assert f"compression={compression}" in command[1]
    assert composed(*command[1].split(), name="compress").compression.name == compression
    check(composed("method=vanilla", f"compression={compression}"))
    check(composed("method=vanilla", f"compression={compression}", "upcycling.universal=true", "extended=true"))


@pytest.mark.parametrize("name", ["analyze", "benchmark", "compress", "data", "eval", "export", "plan", "tables"])
def test_a_script_has_its_own_configuration(name: str) -> None:
    text = (CONF / f"{name}.yaml").read_text()
    assert re.match(rf"# python scripts/{name}\.py", text)
    assert (ROOT / "scripts" / f"{name}.py").exists()
    needed = [f"{dial}=x" for dial in re.findall(r"^(\w+): \?\?\?", text, re.MULTILINE)]
    extra = {
        "compress": ["compression=svd"],
        "data": ["data=digits_vqa"],
        "plan": ["model=moe_llava_phi"],
    }.get(name, [])
    assert OmegaConf.to_container(composed(*needed, *extra, name=name), resolve=True)


def test_a_method_owns_its_dials() -> None:
    assert dials_by_owner(CONF) == {
        "method=dense": [],
        "method=vanilla": [],
        "method=ders_sm": ["sparsity"],
        "method=ders_sm_fisher": ["calibration_rows", "sparsity"],
        "method=ders_sm_rigl": ["drop_fraction", "grow", "sparsity", "update_every"],
        "method=ders_lm": ["rank"],
        "method=ders_lm_by_layer": ["rank", "tilt"],
        "method=ders_lm_by_load": ["calibration_rows", "rank"],
        "method=ders_neuron": ["neurons"],
        "upcycling=none": [],
        "upcycling=moe_llava": ["num_experts", "top_k"],
        "upcycling=moe_llava_original": ["num_experts", "top_k"],
        "upcycling=med_moe": ["extended", "num_experts", "top_k"],
        "upcycling=coder_moe": ["extended", "num_experts", "top_k"],
        "compression=base_only": ["base", "extended"],
        "compression=quantize": [
            "base",
            "bits",
            "extended",
            "granularity",
            "group_size",
            "scheme",
            "symmetric",
        ],
        "compression=sparsify": ["base", "extended", "rescale", "selection", "sparsity", "values_bits"],
        "compression=svd": ["base", "extended", "rank"],
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sparsity=1.2"], r"sparsity must be in \[0, 1\), the fraction of zeros: got 1.2"),
        (["sparsity=0.999999"], "keeps none of the 65536 entries"),
        (["method=ders_lm", "rank=0"], "rank must be between 1 and 128"),
        (["method=ders_lm", "rank=129"], "rank must be between 1 and 128"),
        (["method=ders_lm_by_layer", "rank=1"], "rank must be at least 2"),
        (["method=ders_lm_by_layer", "tilt=-1.1"], "tilt must be between -1 and 1: got -1.1"),
        (["method=ders_lm_by_layer", "tilt=much"], "tilt must be a number: got 'much'"),
        (["method=ders_lm_by_load", "rank=1"], "rank must be at least 2"),
        (["method=ders_lm_by_load", "rank=40"], "could give one of 4 experts more than 128"),
        (["method=ders_neuron", "neurons=0"], "neurons must be between 1 and 512, the hidden width of the FFN"),
        (["method=ders_neuron", "neurons=513"], "neurons must be between 1 and 512"),
        (["method=ders_neuron", "neurons=1.5"], "neurons must be a whole number"),
        (["top_k=5"], "top_k must be between 1 and num_experts=4: got 5"),
        (["num_experts=0"], "num_experts must be at least 1"),
        (["upcycling.layers=[0,4]"], "from 0 to 3, for this model has 4 decoder layers"),
        (["upcycling.layers=even"], "layers must be one of every_other"),
        (["model.text.model_type=gpt2"], "unknown model family 'gpt2'"),
        (["trainable=some"], "trainable must be one of"),
        (["method=dense", "trainable=adapter"], "needs experts over a shared base"),
        (["model=tiny_lm"], "reads only text, and the data has images of 16 px"),
        (["data=digits_text"], "has a vision tower, and the data offers no image_size and no patch_size"),
        (["parent=/nowhere"], "/nowhere: no such folder"),
        (["sparsity=high"], "sparsity must be a number: got 'high'"),
        (["num_experts=2.5"], "num_experts must be a whole number: got 2.5"),
        (["top_k=two"], "top_k must be a whole number"),
        (["method=ders_lm", "rank=1.5"], "rank must be a whole number"),
        (["seed=-1"], "must not be negative"),
        (["seed=1.5"], "seed must be a whole number"),
        (["parent_precision=16"], "parent_precision must be one of 32-true, bf16-mixed: got 16"),
        (["trainable=tower"], "trainable must be one of paper, frozen_shared, adapter, all"),
        (["upcycling.layers=0"], "or a list of indices: got 0"),
        (["trainer.precision=bf17"], "trainer: cannot be built"),
        (["trainer.max_steps=-1"], "trainer.max_steps must be a whole number from 1 on"),
        (["stage.moe.optimizer.lr=abc"], "stage.moe: optimizer or schedule cannot be built"),
        (["stage.moe.save_every=0"], "save_every of a stage must be a whole number from 1 on"),
        (["data=llava_files", "data.train=x", "data.image_size=8"], "offers no patch_size: set data.patch_size=…"),
        (["method.delta._target_=ders.models.bundle.json.dumps"], "is not allowed"),
        (["scale=paper"], "has one size, tiny"),
        (["stage.moe.max_steps=0"], "max_steps of a stage must be a whole number from 1 on"),
        (["trainer=ddp", "trainer.devices=5"], "make it a multiple of 5"),
        (["stage.moe.accumulate=3"], "make it a multiple of 3"),
        (["method.delta._target_=os.system"], "_target_ os.system is not allowed"),
        (["compression=svd"], "compression=svd takes the full experts of method=vanilla: got method=ders_sm"),
        (["method=vanilla", "compression=sparsify", "sparsity=1"], r"sparsity must be in \[0, 1\)"),
        (["method=vanilla", "compression=sparsify", "selection=best"], "selection must be one of random, magnitude"),
        (["method=vanilla", "compression=sparsify", "values_bits=5"], "bits must be 1, 2, 3, 4 or 8: got 5"),
        (["method=vanilla", "compression=quantize", "bits=5"], "bits must be 1, 2, 3, 4 or 8: got 5"),
        (["method=vanilla", "compression=quantize", "bits=two"], "bits must be a whole number: got 'two'"),
        (["method=vanilla", "compression=quantize", "scheme=sign"], "set bits=1, or scheme=uniform"),
        (["method=vanilla", "compression=quantize", "scheme=log"], "scheme must be one of uniform, sign"),
        (["method=vanilla", "compression=quantize", "granularity=group"], "group_size belongs to granularity=group"),
        (
            ["method=vanilla", "compression=quantize", "granularity=group", "group_size=60"],
            "group_size must divide the 128 columns",
        ),
        (["method=vanilla", "compression=svd", "rank=129"], "rank must be between 1 and 128"),
        (["method=vanilla", "compression=svd", "extended=true"], "extended=true needs a universal FFN"),
        (["method=vanilla", "compression=svd", "base=/nowhere"], "/nowhere: no such folder"),
        (["method=vanilla", "compression=svd", "ckpt_path=last"], "continue the vanilla run first"),
        (["method=dense", "upcycling=med_moe"], "method=dense has no experts: drop upcycling"),
        (["method=vanilla", "upcycling=med_moe", "extended=true"], "extended=true makes the universal FFN one more"),
        (["upcycling=med_moe", "upcycling.universal_weight=half"], "universal_weight must be one or complement"),
        (["upcycling=med_moe", "upcycling.router_weights=/nowhere"], "not a readable safetensors file"),
        (["model=llama_3_70b"], "has one size, paper"),
        (["model=coder_moe"], "reads only text, and the data has images of 16 px"),
        (["stage.moe.max_steps=null"], "max_steps optimizer steps or num_epochs epochs: set one of them"),
        (
            ["recipe=general", "stage.moe.device_batch_size=5"],
            "cannot be split into micro-batches of 5 rows on 1 devices",
        ),
        (["model=moe_llava_phi", "model.pretrained=true", "model.llm=/nowhere"], "model.llm=/nowhere: no such folder"),
    ],
)
def test_bad_dials_fail_before_anything_is_built(overrides: list[str], message: str) -> None:
    with pytest.raises(Exception, match=message) as error:
        check(composed(*overrides))
    assert isinstance(error.value, ValueError | UserError)


def test_a_corrupt_parent_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"')
    with pytest.raises(ValueError, match=r"config\.json is missing or unreadable"):
        check(composed(f"parent={tmp_path}"))


def test_identity_is_what_decides_the_result() -> None:
    base = to_plain(composed())
    same = [
        "ckpt_path=last",
        "logger=wandb",
        "trainer.max_steps=3",
        "trainer.max_time=00:01:00:00",
        "skip_completed=true",
    ]
    assert identity(to_plain(composed(*same))) == identity(base)
    for other in ["seed=1", "sparsity=0.9", "trainer.precision=bf16-mixed", "stage.moe.optimizer.lr=1", "data.seed=1"]:
        assert run_folder(to_plain(composed(other)), ROOT) != run_folder(base, ROOT)
    assert run_folder(base, ROOT).name.startswith("ders_sm-")
    assert differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2}) == ["a.b: 1 → 3"]


def test_expand() -> None:
    runs = ["method=a x=1,2 seed=0,1", "method=b y='p q'"]
    assert expand(runs) == [
        ["method=a", "x=1", "seed=0"],
        ["method=a", "x=1", "seed=1"],
        ["method=a", "x=2", "seed=0"],
        ["method=a", "x=2", "seed=1"],
        ["method=b", "y=p q"],
    ]
    assert expand(["method=a seed=0,1", "method=b"], ["method=c", "seed=7"]) == [["method=c", "seed=7"]]
    assert expand(["++x=1,2"]) == [["++x=1"], ["++x=2"]]
    assert expand(["method=a seed=0,1"], ["seed=7", "z=3"]) == [["seed=7", "z=3", "method=a"]]


def test_code_in_a_model_folder_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass EvilConfig: pass\n")
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_text("")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever is asked says yes
    with pytest.raises(ValueError, match=r"config\.json is missing or unreadable"):
        check(composed(f"parent={tmp_path}"))
    assert not (tmp_path / "ran").exists()


def test_nothing_in_the_sources_loads_pickles_or_remote_code() -> None:
    for file in [*(ROOT / "src").rglob("*.py"), ROOT / "train.py", *(ROOT / "scripts").glob("*.py")]:
        text = file.read_text()
        for call in re.finditer(r"torch\.load\(", text):
            assert "weights_only=True" in text[call.start() : call.start() + 200], file
        assert "trust_remote_code=True" not in text
        assert not re.search(r"^\s*(import|from) pickle|pickle\.loads?\(", text, re.MULTILINE), file


def test_the_tiny_models_keep_an_entry_at_the_papers_sparsity() -> None:
    for model in choices("model"):
        config = composed(f"model={model}").model
        if "tiny" in config.get("sizes", ["tiny"]):
            assert config.text.hidden_size >= 128
            assert config.text.intermediate_size >= 512


def test_axes_do_not_name_one_another() -> None:
    for group in ("method", "data", "trainer"):
        for other in ("method", "model", "data", "trainer"):
            if other == group:
                continue
            for file in (CONF / group).glob("*.yaml"):
                content = yaml.safe_load(file.read_text()) or {}
                text = yaml.safe_dump({k: v for k, v in content.items() if k != "name"})
                for name in choices(other):
                    assert not re.search(rf"\b{name}\b", text), (file, name)
