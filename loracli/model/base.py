"""The base model: found, loaded, and held against what the adapters expect of it.

The base model: found, loaded, and held against what the adapters expect of it. The only loader of transformers'
models.

A base model as far as its config tells: found without any weight.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional as F

from loracli.adapters.adapter import LoraAdapter, LoraModule, kernels_of
from loracli.adapters.base_module import BaseModule, ModuleKind
from loracli.adapters.base_names import by_base_names
from loracli.adapters.experts import turned_by_version
from loracli.adapters.names import BasePlace, leaf
from loracli.adapters.other_bases import other_bases, say_other_bases
from loracli.adapters.tasks import CAUSAL_LM, model_class
from loracli.errors import BaseModelMismatch, HubUnreachable, InputError, UnsupportedAdapter, UsageError
from loracli.hub.fetch import fetch_base
from loracli.hub.references import (
    URI_PREFIX,
    BaseClaim,
    agreed_base,
    distinct_bases,
    is_hub_id,
    is_revision,
    not_on_the_hub,
)
from loracli.model.base_copies import check_base_copies
from loracli.model.base_places import BaseNames
from loracli.model.checkpoint import shard_names
from loracli.model.experts import check_experts
from loracli.model.placement import DTYPES, check_device_map, check_sharded, placement_options, ran_out_of_memory, whole
from loracli.model.trust import check_base_files, neutralise
from loracli.progress import SILENT, Progress

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
    base: str | BaseClaim | None,
    *,
    revision: str | None = None,
    progress: Progress = SILENT,
) -> BaseReference:
    """The base model to use: `base`, or what all adapters agree on, fetched from the Hub unless it is a local
    directory.

    Args:
        adapters: that are run in it.
        base: text that the user named; what a recipe or a record claims; None for what the adapters claim.
        revision: that the user named, for a base on the Hub.
        progress: told of a download.
    Raises:
        IncompatibleAdapters: if no base is given and the adapters name none, or what is no name on the Hub.
        UnsupportedAdapter: if an adapter changes a convolution.
        InputError, UsageError: as `locate_base`.
    """
    _refuse_convolutions(adapters)
    stated = {adapter.reference: adapter.config.base_model for adapter in adapters}
    claims = distinct_bases(stated.values())
    if base is None:
        base = agreed_base(
            {a.reference: BaseClaim(a.config.base_model, a.config.base_revision) for a in adapters},
            way_out="give the base with --base",
        )
    place = locate_base(base, revision=revision)
    if isinstance(place, Path):
        name = claims[0] if len(claims) == 1 and is_hub_id(claims[0]) else place.resolve().name
        taken_for = f", taken for {name}, which the adapters name; shapes are checked" if name in claims else ""
        progress.note(f"base model: the local directory {base}{taken_for if name != base else ''}")
        others = other_bases(place.resolve().name, stated, directory=True, saved_as=_saved_as(place))
        say_other_bases(str(base), others, progress)
        return BaseReference(name, place, None)
    name = str(place.base_model)
    say_other_bases(name, other_bases(name, stated), progress)
    try:
        fetched = fetch_base(name, revision=place.revision, progress=progress)
    except (HubUnreachable, InputError) as error:
        error.hint = "; ".join(filter(None, [error.hint, "or give a local copy of the model with --base"]))
        raise
    return BaseReference(name, fetched.path, fetched.commit)


def _saved_as(folder: Path) -> str | None:
    """The Hub id that older versions of transformers kept in the config of what they saved, None without one."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None  # said when it is loaded
    name = config.get("_name_or_path") if isinstance(config, dict) else None
    return name if isinstance(name, str) and "/" in name and is_hub_id(name) else None


def locate_base(base: str | BaseClaim, *, revision: str | None = None) -> Path | BaseClaim:
    """The local directory of a base model, or its name on the Hub with the revision that is wanted.

    Args:
        base: text is what the user named: a directory if there is one, else a Hub id, and with `hf://` always a Hub id.
            A claim is somebody else's word, and never looked for on the disk.
        revision: that the user named; None for the claim's own.
    Raises:
        InputError: if it is neither a directory of a base model nor a name on the Hub.
        UsageError: if a revision is asked of a directory, which has none, or it cannot be one.
    """
    if revision is not None and not is_revision(revision):
        raise UsageError(f"--base-revision {revision} cannot be a branch, tag or commit")
    if isinstance(base, str) and base.startswith(URI_PREFIX):
        base = BaseClaim(base.removeprefix(URI_PREFIX), None)
    elif isinstance(base, str):
        local = _directory(base, revision)
        if local is not None:
            return local
        base = BaseClaim(base, None)
    if (reason := not_on_the_hub(base)) is not None:
        raise InputError(f"no base model can be had: there is {reason}", hint=WAY_OUT)
    return BaseClaim(base.base_model, revision or base.revision)


def _directory(base: str, revision: str | None) -> Path | None:
    """The directory that the user named; None for a name on the Hub."""
    local = Path(base).expanduser()
    if not local.is_dir():
        if not is_hub_id(base):
            raise InputError(f"the base model {base} is not a directory", hint=WAY_OUT)
        return None
    if revision is not None:
        raise UsageError(
            f"the base model {base} is a local directory, which has no revision {revision}",
            hint=f"to use the directory give --base {base} without --base-revision"
            + (f"; for the Hub's, --base {URI_PREFIX}{base}" if is_hub_id(base) else ""),
        )
    if not (local / "config.json").is_file():
        raise InputError(f"the base model {base} has no config.json", hint=WAY_OUT)
    check_base_files(local, base)
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


def on_base(
    adapters: Sequence[LoraAdapter], reference: BaseReference, *, task: str | None = None
) -> tuple[LoraAdapter, ...]:
    """The adapters by the base's names (model/base_places.py), with an update for every expert of a parameter, and
    the factors of experts in the order of today's PEFT; `task` as for `plan_base`.

    Raises:
        BaseModelMismatch: as `plan_base` and `by_base_names`.
    """
    skeleton = plan_base(reference, task=task, dequantised=True).skeleton
    return named_as(skeleton, adapters)


def named_as(skeleton: Any, adapters: Sequence[LoraAdapter]) -> tuple[LoraAdapter, ...]:
    """As `on_base`, of a model without numbers."""
    names, found = BaseNames(skeleton), []
    for adapter in adapters:
        places = names.places(adapter)
        base = {place.target: _base_module(skeleton, place.target) for place in places.values()}
        turned = _turned_experts(skeleton, adapter, places)
        found.append(by_base_names(adapter, places | turned, {n: m for n, m in base.items() if m is not None}))
    return tuple(found)


def _base_module(skeleton: Any, target: str) -> BaseModule | None:
    """A module of the base or a parameter with experts; None of what carries no update."""
    if (shape := expert_shape(skeleton, target)) is not None:
        return BaseModule(target, "experts", shape[1], shape[2], shape[0])
    kind, in_features, out_features = kind_and_shape(skeleton.get_submodule(target))
    return None if kind == "other" else BaseModule(target, kind, in_features, out_features)


def _turned_experts(skeleton: Any, adapter: LoraAdapter, places: Mapping[str, BasePlace]) -> dict[str, BasePlace]:
    """The parameters whose lora_A and lora_B change places: by their shapes, and where those are alike by the PEFT that
    wrote them."""
    found = {}
    for target, modules in adapter.targets.items():
        shape = expert_shape(skeleton, places[target].target) if target in places else None
        if modules[0].kind != "experts" or shape is None or adapter.places:
            continue
        factors, sizes = modules[0].factors, shape[1:]
        theirs = factors.in_features, factors.out_features
        owner = skeleton.get_submodule(places[target].target.rpartition(".")[0])
        older = turned_by_version(adapter.config.peft_version, transposed=getattr(owner, "is_transposed", False))
        if theirs == sizes[::-1] and (sizes[0] != sizes[1] or older):
            found[target] = replace(places[target], turned=True)
    return found


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
    reference: BaseReference,
    *,
    dtype: str = "auto",
    device: str = "auto",
    dequantised: bool = False,
    task: str | None = None,
) -> BasePlan:
    """Reads the config and settles dtype and device, as `load_base` will; `dequantised` takes a quantised base for the
    model that it is in full precision, `task` (PEFT's name of it) for another than a causal language model.

    Raises:
        BaseModelMismatch: if transformers knows no such model, it is quantised, or its files name what is not followed.
        UsageError: if there is no such dtype, or the device cannot be used.
    """
    import transformers
    from transformers import AutoConfig

    device = _resolve_device(device)
    auto = getattr(transformers, model_class(task))
    check_base_files(reference.path, reference.id)
    with _loading(reference, auto.__name__):
        config = neutralise(AutoConfig.from_pretrained(reference.path, **OFFLINE))
    if dequantised:
        vars(config).pop("quantization_config", None)
    if getattr(config, "quantization_config", None) is not None:
        raise BaseModelMismatch(
            f"the base model {reference.id} is quantised", hint="give the unquantised model with --base"
        )
    with _loading(reference, auto.__name__), torch.device("meta"):
        skeleton = auto.from_config(deepcopy(config), trust_remote_code=False)
    if task in (None, CAUSAL_LM) and skeleton.get_output_embeddings() is None:
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
    shard_names(reference.path)
    progress.begin("load base model", None, "B")
    try:
        tokenizer = load_tokenizer(reference)
        with _loading(reference, errors=_NO_WEIGHTS):
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
    check_base_copies(adapters, lambda name: whole(base.model.get_submodule(name).weight).cpu())


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
            found.append(BaseModule(name, "experts", shape[1], shape[2], shape[0]))
    for name, module in model.named_modules():
        if name and leaf(name) in leaves:
            kind, in_features, out_features = kind_and_shape(module)
            found.append(BaseModule(name, kind, in_features, out_features))
    return tuple(found)


# Where weights are loaded, others may be a device's fault.
_NO_WEIGHTS = (OSError, ValueError, LookupError, ImportError, TypeError, AttributeError, SafetensorError)


@contextmanager
def _loading(
    reference: BaseReference, auto: str = "AutoModelForCausalLM", *, errors: tuple[type[Exception], ...] = (Exception,)
) -> Iterator[None]:
    """transformers without bars and chatter, and its errors as ours: of files that make no sense it raises any kind.
    `auto` is its class for the base."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    except errors as error:
        if ran_out_of_memory(error):
            raise
        message = str(error).strip().splitlines()
        kind = "a causal language model" if auto == "AutoModelForCausalLM" else f"a model for {auto}"
        raise BaseModelMismatch(
            f"the base model {reference.id} cannot be loaded: {message[0] if message else type(error).__name__}",
            hint=f"it must be {kind} in safetensors that transformers knows without remote code",
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

    if isinstance(module, nn.Linear) and _is_linear(module):
        return "linear", module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return "conv1d", module.weight.shape[0], module.weight.shape[1]
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    known = isinstance(module, (nn.Linear, nn.Embedding))  # with a forward of its own, or numbers that are not stored
    if not known and weight is not None and weight.dim() == 2 and weight.is_floating_point():
        return "parameter", weight.shape[1], weight.shape[0]
    scaled = hasattr(module, "embed_scale")  # as Gemma 3 has it; PEFT scales the update too
    if isinstance(module, nn.Embedding) and (scaled or type(module).forward is nn.Embedding.forward):
        return "embedding", module.num_embeddings, module.embedding_dim
    return "other", 0, 0


def _is_linear(module: nn.Linear) -> bool:
    """Whether its forward is x W^T + b. That of a subclass is tried on a copy with a few numbers of its own: a layer of
    the same class and attributes, 3 x 5, on inputs of several shapes and sizes. One with more tensors than weight and
    bias, with another shape or kind of weight, as quantised layers have, or with hooks into it is not tried."""
    if type(module).forward is nn.Linear.forward:
        return True
    own = {**module._parameters, **module._buffers, **module._modules}
    plain = type(module.weight) is nn.Parameter and module.weight.is_floating_point()
    shape = (module.out_features, module.in_features)
    if own.keys() - {"weight", "bias"} or not plain or tuple(module.weight.shape) != shape:
        return False
    numbers = torch.Generator(device="cpu").manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=numbers, dtype=torch.float64, device="cpu")

    tried = copy(module)
    weight, bias = draw(3, 5), None if module.bias is None else draw(3)
    parameters = {"weight": weight, "bias": bias}
    tried._parameters = {n: None if t is None else nn.Parameter(t, requires_grad=False) for n, t in parameters.items()}
    tried.in_features, tried.out_features = 5, 3
    try:
        with torch.no_grad():
            for x in (draw(5), draw(4, 5), 1e4 * draw(2, 4, 5), 1e-4 * draw(2, 4, 5)):
                y = type(module).forward(tried, x)
                if not isinstance(y, torch.Tensor) or not torch.allclose(y, F.linear(x, weight, bias), rtol=1e-9):
                    return False
    except Exception:  # a forward that takes or needs something else
        return False
    return True


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
    if kind not in {"embedding": ("embedding",), "parameter": ("parameter",)}.get(module.kind, ("linear", "conv1d")):
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


def plan_from_config(
    base: str | BaseClaim, *, revision: str | None = None, progress: Progress = SILENT
) -> tuple[BasePlan, str]:
    """The plan of a base model, and the sha256 of its config.

    Args:
        base: as `locate_base` takes it; of one on the Hub only config.json is fetched.
        revision: of a base on the Hub.
        progress: told of a download.
    Raises:
        InputError, UsageError: as `locate_base`.
        BaseModelMismatch: if transformers knows no such causal language model.
        InputError, HubUnreachable: if the Hub does not give the config.
    """
    place = locate_base(base, revision=revision)
    if isinstance(place, Path):
        reference = BaseReference(str(base), place, None)
    else:
        try:
            fetched = fetch_base(str(place.base_model), revision=place.revision, config_alone=True, progress=progress)
        except (HubUnreachable, InputError) as error:
            error.hint = "; ".join(filter(None, [error.hint, WAY_OUT]))
            raise
        reference = BaseReference(fetched.repo_id, fetched.path, fetched.commit)
    plan = plan_base(reference, device="cpu")
    return plan, sha256((reference.path / "config.json").read_bytes()).hexdigest()
