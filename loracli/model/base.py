"""The base model: found, loaded, and held against what the adapters expect of it.

The base model: found, loaded, and held against what the adapters expect of it. The only loader of transformers'
models.

A base model as far as its config tells: found without any weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loracli.adapters.adapter import LoraAdapter, LoraModule, kernels_of
from loracli.adapters.names import leaf
from loracli.adapters.on_base import as_fused_experts, as_text_model, has_expert_layers, inside_other_model
from loracli.errors import BaseModelMismatch, HubUnreachable, InputError, UnsupportedAdapter, UsageError
from loracli.hub.fetch import fetch_base
from loracli.hub.references import BaseClaim, agreed_base, is_path
from loracli.model.experts import check_experts
from loracli.model.placement import DTYPES, check_device_map, check_sharded, placement_options, whole
from loracli.progress import SILENT, Progress
from loracli.recipe.recipe import BaseModule, ModuleKind

OFFLINE = {"local_files_only": True, "trust_remote_code": False}
WAY_OUT = "give a directory that holds the base's config.json with --base, or its Hub id"


@dataclass(frozen=True)
class BaseReference:
    """Which base model, before it is loaded.

    Args:
        id: the name that an export will carry: a Hub id where there is one.
        path: the directory with config, tokenizer and safetensors.
        commit: of the Hub repository, None for a local directory.
    """

    id: str
    path: Path
    commit: str | None


@dataclass(frozen=True)
class BaseModel:
    """A loaded base model, frozen and in evaluation mode.

    Args:
        reference: where it came from.
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        dtype: of its weights and of the adapters' products.
        config_sha256: of its config.json.
    """

    reference: BaseReference
    model: Any
    tokenizer: Any
    dtype: torch.dtype
    config_sha256: str

    @property
    def config(self) -> Any:
        """transformers' config of it."""
        return self.model.config


def find_base(
    adapters: Sequence[LoraAdapter],
    base: str | None,
    *,
    revision: str | None = None,
    progress: Progress = SILENT,
) -> BaseReference:
    """The base model to use: `base`, or what all adapters agree on, fetched from the Hub unless it is a local
    directory.

    Raises:
        IncompatibleAdapters: if no base is given and the adapters name none, or a path that only their author has.
        UnsupportedAdapter: if an adapter changes a convolution.
        InputError, UsageError: as `base_directory`.
    """
    _refuse_convolutions(adapters)
    claimed = None
    claims = sorted({a.config.base_model for a in adapters if a.config.base_model})
    if base is None:
        claim = agreed_base(
            {a.reference: BaseClaim(a.config.base_model, a.config.base_revision) for a in adapters},
            way_out="give the base with --base",
        )
        base, claimed = str(claim.base_model), claim.revision
    local = base_directory(base, revision=revision)
    if local is not None:
        name = claims[0] if len(claims) == 1 and not is_path(claims[0]) else local.resolve().name
        taken_for = f", taken for {name}, which the adapters name; shapes are checked" if name in claims else ""
        progress.note(f"base model: the local directory {base}{taken_for if name != base else ''}")
        return BaseReference(name, local, None)
    if claims and claims != [base]:
        progress.warn(f"the adapters name {', '.join(claims)} and not {base}; only shapes are checked")
    try:
        fetched = fetch_base(base, revision=revision or claimed, progress=progress)
    except (HubUnreachable, InputError) as error:
        error.hint = "; ".join(filter(None, [error.hint, "or give a local copy of the model with --base"]))
        raise
    return BaseReference(base, fetched.path, fetched.commit)


def base_directory(base: str, *, revision: str | None = None) -> Path | None:
    """The local directory that `base` names; None for an id on the Hub.

    Raises:
        InputError: if it is no directory of a base model.
        UsageError: if a revision is asked of a directory, which has none.
    """
    local = Path(base).expanduser()
    if not local.is_dir():
        if is_path(base):
            raise InputError(f"the base model {base} is no directory", hint=WAY_OUT)
        return None
    if revision is not None:
        raise UsageError(
            f"the base model {base} is a local directory, which has no revision {revision}",
            hint=f"to use the directory give --base {base} without --base-revision",
        )
    if not (local / "config.json").is_file():
        raise InputError(f"the base model {base} has no config.json", hint=WAY_OUT)
    if (local / "adapter_config.json").exists():
        raise InputError(f"the base model {base} is an adapter: it holds adapter_config.json", hint=WAY_OUT)
    if not local.resolve().name.isprintable():  # it may become the id that a recipe keeps, which is one line of text
        raise InputError(f"the directory {base} has a name with control characters", hint="rename it")
    return local


def _refuse_convolutions(adapters: Sequence[LoraAdapter]) -> None:
    for adapter in adapters:
        for name in kernels_of([adapter]):
            raise UnsupportedAdapter(
                f"{adapter.reference} changes the convolution {name}, and only linear layers, embeddings and experts "
                "are run in a base model",
                hint="compose it from the files alone: loracat export --method NAME --adapters ..., without --base",
            )


def on_base(adapters: Sequence[LoraAdapter], reference: BaseReference) -> tuple[LoraAdapter, ...]:
    """The adapters by the base's names: those that were trained inside a larger model on the text model alone, and
    those with a module for each expert on a base that keeps experts in one parameter.

    Raises:
        BaseModelMismatch: as `plan_base`.
    """
    if not any(inside_other_model(adapter) or has_expert_layers(adapter) for adapter in adapters):
        return tuple(adapters)
    skeleton = plan_base(reference).skeleton
    outs = {
        name: shape[2] for name, _ in skeleton.named_parameters() if (shape := expert_shape(skeleton, name)) is not None
    }
    names = {name for name, _ in skeleton.named_modules(remove_duplicate=False)} | outs.keys()
    return tuple(as_fused_experts(as_text_model(adapter, names), outs) for adapter in adapters)


@dataclass(frozen=True)
class BasePlan:
    """How a base model will be loaded, known before any weight is read.

    Args:
        reference: where it is.
        config: transformers' config of it.
        skeleton: the model without numbers, on the device `meta`.
        dtype: of its weights.
        device: that it will be on; with a device map, the kind of device.
    """

    reference: BaseReference
    config: Any
    skeleton: Any
    dtype: torch.dtype
    device: str


def plan_base(
    reference: BaseReference, *, dtype: str = "auto", device: str = "auto", dequantised: bool = False
) -> BasePlan:
    """Reads the config and settles dtype and device, as `load_base` will; `dequantised` takes a quantised base for the
    model that it is in full precision.

    Raises:
        BaseModelMismatch: if transformers knows no such causal language model, or it is quantised.
        UsageError: if there is no such dtype, or the device cannot be used.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    device = _resolve_device(device)
    with _loading(reference):
        config = AutoConfig.from_pretrained(reference.path, **OFFLINE)
        if dequantised:
            vars(config).pop("quantization_config", None)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(deepcopy(config), trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        raise BaseModelMismatch(
            f"the base model {reference.id} is quantised", hint="give the unquantised model with --base"
        )
    if skeleton.get_output_embeddings() is None:
        raise BaseModelMismatch(f"the base model {reference.id} has no language model head")
    resolved = _resolve_dtype(dtype, getattr(config, "dtype", None), device)
    return BasePlan(reference, config, skeleton, resolved, device)


def load_base(
    reference: BaseReference,
    *,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    shard: int | None = None,
    progress: Progress = SILENT,
) -> BaseModel:
    """Loads the model from safetensors alone, without any code of the repository.

    Args:
        dtype: `auto`, or one of float32, bfloat16, float16, float64. `auto` is the base's own dtype, raised to float32
            where the device is slow or wrong in it.
        device: `auto` (a CUDA device if there is one), or a torch device.
        device_map: `auto` puts the layers on all CUDA devices of this process, one after the other.
        shard: K, to share the weights out over the K processes of this fit, which are connected already: each keeps 1/K
            and has a layer whole only while it runs. Every forward then needs all of them.
    Raises:
        BaseModelMismatch: if the directory cannot be loaded as a causal language model.
        OutOfResources: if a device map leaves layers that fit on no CUDA device.
        UsageError: if there is no such dtype, the device cannot be used, or the options contradict each other.
    """
    from transformers import AutoModelForCausalLM

    placement = placement_options(device, device_map, shard)
    plan = plan_base(reference, dtype=dtype, device=device)
    if plan.dtype == torch.float64:  # which transformers' fast products for experts refuse
        placement = {**placement, "experts_implementation": "eager"}
    progress.begin("load base model", None, "B")
    try:
        tokenizer = load_tokenizer(reference)
        with _loading(reference):
            model, report = AutoModelForCausalLM.from_pretrained(
                reference.path,
                config=plan.config,
                dtype=plan.dtype,
                use_safetensors=True,
                output_loading_info=True,
                **placement,
                **OFFLINE,
            )
            if not placement:
                model.to(plan.device)
    finally:
        progress.finish("load base model")
    model.eval().requires_grad_(False)
    absent = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if absent:  # transformers fills these with random numbers
        raise BaseModelMismatch(
            f"the base model {reference.id} lacks the weights {absent[0]}"
            + (f" and {len(absent) - 1} more" if len(absent) > 1 else ""),
            hint="the download is incomplete, or the config belongs to another model",
        )
    if device_map is not None:
        check_device_map(getattr(model, "hf_device_map", {}))
    if shard is not None:
        check_sharded(model)
    digest = hashlib.sha256((reference.path / "config.json").read_bytes()).hexdigest()
    return BaseModel(reference, model, tokenizer, plan.dtype, digest)


def load_tokenizer(reference: BaseReference) -> Any:
    """The base model's tokenizer.

    Raises:
        BaseModelMismatch: if the directory has none that can be loaded.
    """
    from transformers import AutoTokenizer

    with _loading(reference):
        return AutoTokenizer.from_pretrained(reference.path, **OFFLINE)


def check_fits(base: BaseModel, adapters: Sequence[LoraAdapter]) -> None:
    """Every module that an adapter changes must be in the base, of the same kind and shape, and such that adapters can
    be attached to it.

    Raises:
        BaseModelMismatch: naming adapter, module, what was expected and what was found.
    """
    check_shapes(base.model, adapters)
    check_experts(base.model, adapters)
    for adapter in adapters:
        for name in adapter.base_copies:
            own = whole(base.model.get_submodule(name).weight)
            copy = adapter.read_base_copy(name)
            if copy.shape != own.shape or not torch.equal(copy.to(own.dtype), own.cpu()):
                raise BaseModelMismatch(
                    f"{adapter.reference} carries its own matrix for {name}, and it differs from the base model's",
                    hint="the adapter was trained with a changed embedding, which an adapter cannot carry",
                )


def check_shapes(model: nn.Module, adapters: Sequence[LoraAdapter]) -> None:
    """As `check_fits`, for what a model without numbers can tell."""
    for adapter in adapters:
        for name, modules in adapter.targets.items():
            if modules[0].kind == "experts":
                _check_experts(model, adapter, name, modules)
            else:
                _check_module(model, adapter, modules[0])


def base_modules(model: nn.Module, adapters: Sequence[LoraAdapter]) -> tuple[BaseModule, ...]:
    """Every module of the base that any targeted leaf name matches: an export pads these without loading the base.

    Of parameters with experts, which it does not pad, those that are targeted.
    """
    targets = {name: modules[0].kind for adapter in adapters for name, modules in adapter.targets.items()}
    leaves = {leaf(name) for name, kind in targets.items() if kind != "experts"}
    found = []
    for name in sorted(name for name, kind in targets.items() if kind == "experts"):
        if (shape := expert_shape(model, name)) is not None:
            found.append(BaseModule(name, "experts", shape[1], shape[2]))
    for name, module in model.named_modules():
        if name and leaf(name) in leaves:
            kind, in_features, out_features = kind_and_shape(module)
            found.append(BaseModule(name, kind, in_features, out_features))
    return tuple(found)


@contextmanager
def _loading(reference: BaseReference) -> Iterator[None]:
    """transformers without bars and chatter, and its errors as ours."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        message = str(error).strip().splitlines()
        raise BaseModelMismatch(
            f"the base model {reference.id} cannot be loaded: {message[0] if message else type(error).__name__}",
            hint="it must be a causal language model in safetensors that transformers knows without remote code",
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _resolve_device(asked: str) -> str:
    """The device, once it is seen to be there."""
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=asked).item()  # the device `meta` has no numbers
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"--device {asked} cannot be used: {reason}") from None
    return asked


def _resolve_dtype(asked: str, own: object, device: str) -> torch.dtype:
    if asked != "auto":
        if asked not in DTYPES:
            raise UsageError(f"--dtype {asked} is not one of auto, {', '.join(DTYPES)}")
        return DTYPES[asked]
    dtype = own if isinstance(own, torch.dtype) else torch.float32
    fast = device != "cpu" or dtype == torch.float64 or (dtype == torch.bfloat16 and _cpu_has_bfloat16())
    return dtype if fast else torch.float32


def _cpu_has_bfloat16() -> bool:
    # Without these instructions bfloat16 on a CPU is 45 to 500 times slower than float32 (pytorch issue 146508).
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def kind_and_shape(module: nn.Module) -> tuple[ModuleKind, int, int]:
    from transformers.pytorch_utils import Conv1D

    # A subclass with a forward of its own (a quantised layer, say) computes something else than W x.
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return "linear", module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return "conv1d", module.weight.shape[0], module.weight.shape[1]
    scaled = hasattr(module, "embed_scale")  # as Gemma 3 has it; PEFT scales the update too
    if isinstance(module, nn.Embedding) and (scaled or type(module).forward is nn.Embedding.forward):
        return "embedding", module.num_embeddings, module.embedding_dim
    return "other", 0, 0


def expert_shape(model: nn.Module, parameter: str) -> tuple[int, int, int] | None:
    """Number of experts, in and out of a parameter with a matrix for each expert; None if it is no such parameter.

    As PEFT takes it: (E, out, in), or (E, in, out) where the module says that it is transposed.
    """
    owner, _, name = parameter.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        return None
    tensor = dict(module.named_parameters(recurse=False)).get(name)
    if tensor is None or tensor.dim() != 3:
        return None
    experts, rows, columns = tensor.shape
    return (experts, rows, columns) if getattr(module, "is_transposed", False) else (experts, columns, rows)


def _check_experts(model: nn.Module, adapter: LoraAdapter, name: str, modules: Sequence[LoraModule]) -> None:
    shape = expert_shape(model, name)
    if shape is None:
        raise BaseModelMismatch(
            f"{adapter.reference} adapts {name} as experts, and the base model has no parameter of that name with a "
            "matrix for each expert",
            hint="the adapter was trained on another model or model class; check --base",
        )
    for factors in (module.factors for module in modules):
        theirs = (len(modules), factors.in_features, factors.out_features)
        if theirs == shape:
            continue
        raise BaseModelMismatch(
            f"{adapter.reference} expects {name} to be (experts, in, out) = {theirs}; the base model has {shape}",
            hint="the adapter was trained on another model; check --base",
        )


def _check_module(model: nn.Module, adapter: LoraAdapter, module: LoraModule) -> None:
    try:
        target = model.get_submodule(module.name)
    except AttributeError:
        raise BaseModelMismatch(
            f"{adapter.reference} adapts {module.name}, which the base model does not have",
            hint="the adapter was trained on another model or model class; check --base",
        ) from None
    kind, in_features, out_features = kind_and_shape(target)
    expected = ("embedding",) if module.kind == "embedding" else ("linear", "conv1d")
    if kind not in expected:
        raise BaseModelMismatch(
            f"{adapter.reference} adapts {module.name}, a {type(target).__name__}, as {module.kind}"
        )
    theirs = (module.factors.out_features, module.factors.in_features)
    if theirs != (out_features, in_features):
        raise BaseModelMismatch(
            f"{adapter.reference} expects {module.name} to be (out, in) = {theirs}; the base model has "
            f"{(out_features, in_features)}",
            hint="the adapter was trained on another model; check --base",
        )


def plan_from_config(base: str, *, revision: str | None = None, progress: Progress = SILENT) -> tuple[BasePlan, str]:
    """The plan of a base model, and the sha256 of its config.

    Args:
        base: a local directory with a config.json, or a Hub id, of which only config.json is fetched.
        revision: of a base on the Hub.
        progress: told of a download.
    Raises:
        InputError, UsageError: as `base_directory`.
        BaseModelMismatch: if transformers knows no such causal language model.
        InputError, HubUnreachable: if the Hub does not give the config.
    """
    path = base_directory(base, revision=revision)
    if path is None:
        try:
            path = fetch_base(base, revision=revision, config_alone=True, progress=progress).path
        except (HubUnreachable, InputError) as error:
            error.hint = "; ".join(filter(None, [error.hint, WAY_OUT]))
            raise
    plan = plan_base(BaseReference(base, path, None), device="cpu")
    return plan, sha256((path / "config.json").read_bytes()).hexdigest()
