"""The base model: planned from its config alone, then loaded from safetensors, and held against what adapters expect of
it. The only loader of transformers' models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from loracli.adapters.adapter import LoraAdapter
from loracli.adapters.claims import CAUSAL_LM, model_class
from loracli.errors import AccessDenied, BaseModelMismatch, HubUnreachable, InputError, OutOfResources, UsageError
from loracli.hub.fetch import BASE_TOKENIZERS, fetch_base
from loracli.hub.references import BaseClaim, Named
from loracli.model.checkpoint import shard_names
from loracli.model.experts import check_experts
from loracli.model.modules import check_base_copies, check_shapes, named_as
from loracli.model.placement import DTYPES, decoder_layers, has_float64, ran_out_of_memory, resolve_device
from loracli.model.quantisation import Quantisation, read_quantisation, run_exactly
from loracli.model.reference import (
    WAY_OUT,
    BaseReference,
    check_base_files,
    locate_base,
    neutralise,
    refuse_mistyped,
)
from loracli.progress import SILENT, Progress, begun
from loracli.system.document import dtype_name
from loracli.system.machine import read_launch

_OFFLINE = {"local_files_only": True, "trust_remote_code": False}


@dataclass(frozen=True)
class BaseModel:
    """A loaded base model, frozen and in evaluation mode.

    Args:
        reference: where it came from.
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        dtype: of its weights, where they are not quantised, and of all products.
        config_sha256: of its config.json.
        quantisation: of its linear layers, None in full precision.
    """

    reference: BaseReference
    model: Any
    tokenizer: Any
    dtype: torch.dtype
    config_sha256: str
    quantisation: Quantisation | None = None

    @property
    def config(self) -> Any:
        """transformers' config of it."""
        return self.model.config

    @property
    def runs_in(self) -> str:
        """`bfloat16`, or `bfloat16, its linear layers kept in nf4,` to be said of it."""
        kept = "" if self.quantisation is None else f", its linear layers kept in {self.quantisation.form},"
        return dtype_name(self.dtype) + kept


def on_base(
    adapters: Sequence[LoraAdapter], reference: BaseReference, *, task: str | None = None
) -> tuple[LoraAdapter, ...]:
    """The adapters by the base's names (model/modules.py), with an update for every expert of a parameter, and
    the factors of experts in the order of today's PEFT; `task` as for `plan_base`.

    Raises:
        BaseModelMismatch: as `plan_base` and `by_base_names`.
    """
    skeleton = plan_base(reference, task=task, dequantised=True).skeleton
    return named_as(skeleton, adapters)


@dataclass(frozen=True)
class BasePlan:
    """How a base model will be loaded, known before any weight is read.

    Args:
        reference: where it is.
        config: transformers' config of it.
        skeleton: the model without numbers, on the device `meta`.
        dtype: of its weights, where they are not quantised.
        device: that it will be on; with a device map, the kind of device.
        quantisation: of its linear layers, None in full precision; the skeleton is in full precision.
    """

    reference: BaseReference
    config: Any
    skeleton: Any
    dtype: torch.dtype
    device: str
    quantisation: Quantisation | None = None


def plan_base(
    reference: BaseReference,
    *,
    dtype: str = "auto",
    device: str = "auto",
    quantise: str | None = None,
    dequantised: bool = False,
    task: str | None = None,
) -> BasePlan:
    """Reads the config and settles dtype and device, as `load_base` will; `dequantised` takes a quantised base for the
    model that it is in full precision, `task` (PEFT's name of it) for another than a causal language model.

    Raises:
        BaseModelMismatch: if transformers knows no such model, it is quantised in a way that is not run, or its files
            name what is not followed.
        UsageError: if there is no such dtype, the device cannot be used, or as `read_quantisation`.
    """
    import transformers

    device = resolve_device(device)
    auto = getattr(transformers, model_class(task))
    config = _read_config(reference, auto.__name__)
    quantisation = None if dequantised else read_quantisation(vars(config), reference.id, quantise=quantise)
    for key in ("quantization_config", "compression_config"):
        vars(config).pop(key, None)
    with _loading(reference, auto.__name__), torch.device("meta"):
        skeleton = auto.from_config(deepcopy(config), trust_remote_code=False)
    if task in (None, CAUSAL_LM) and skeleton.get_output_embeddings() is None:
        raise BaseModelMismatch(f"the base model {reference.id} has no language model head")
    resolved = _resolve_dtype(dtype, getattr(config, "dtype", None), device)
    return BasePlan(reference, config, skeleton, resolved, device, quantisation)


def settled(reference: BaseReference, *, dtype: str, device: str) -> tuple[torch.dtype, str]:
    """The dtype, and the kind of device, that the base will have here, as `plan_base` settles them.

    Raises:
        BaseModelMismatch, UsageError: as there.
    """
    device, config = resolve_device(device), _read_config(reference)
    return _resolve_dtype(dtype, getattr(config, "dtype", None), device), torch.device(device).type


def _read_config(reference: BaseReference, auto: str = "AutoModelForCausalLM") -> Any:
    from transformers import AutoConfig

    check_base_files(reference.path, reference.id)
    with _loading(reference, auto):
        return neutralise(AutoConfig.from_pretrained(reference.path, **_OFFLINE))


def load_base(
    reference: BaseReference,
    *,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    shard: int | None = None,
    quantise: str | None = None,
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
        quantise: `nf4` or `int8`, to keep the linear layers of a base in full precision so.
    Raises:
        BaseModelMismatch: if the directory cannot be loaded as a causal language model.
        OutOfResources: if a device map leaves layers that fit on no CUDA device.
        UsageError: if there is no such dtype, the device cannot be used, or the options contradict each other.
    """
    from transformers import AutoModelForCausalLM

    placement = _placement_options(device, device_map, shard)
    plan = plan_base(reference, dtype=dtype, device=device, quantise=quantise)
    quantisation = plan.quantisation
    if quantisation is not None:
        if shard is not None:
            raise UsageError("a quantised base cannot be shared out over processes", hint="leave --shard out")
        placement = {"device_map": {"": plan.device}} | placement
        if quantisation.stored:
            plan.config.quantization_config = quantisation.loading(plan.dtype).to_dict()
        else:
            placement["quantization_config"] = quantisation.loading(plan.dtype)
    # bitsandbytes does not quantise float64; what is not quantised is widened afterwards.
    read_in = torch.float32 if quantisation is not None and plan.dtype == torch.float64 else plan.dtype
    # transformers' fast products for experts refuse float64.
    experts = {"experts_implementation": "eager"} if plan.dtype == torch.float64 else {}
    shard_names(reference.path)
    with begun(progress, "load base model", None, "B"):
        tokenizer = load_tokenizer(reference)
        with _loading(reference, errors=_NO_WEIGHTS):
            model, report = AutoModelForCausalLM.from_pretrained(
                reference.path,
                config=plan.config,
                dtype=read_in,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, in words
                **experts,
                **placement,
                **_OFFLINE,
            )
            if not placement:
                model.to(plan.device)
    model.eval().requires_grad_(False)
    if quantisation is not None and not run_exactly(model, plan.dtype):
        raise BaseModelMismatch(
            f"the base model {reference.id} has no linear layer to quantise", hint="leave --quantise out"
        )
    mismatched = (f"{name} in the shape {tuple(shape)}" for name, _, shape in report["mismatched_keys"])
    absent = sorted(report["missing_keys"]) + sorted(mismatched)
    if absent:  # transformers fills these with random numbers
        raise BaseModelMismatch(
            f"the base model {reference.id} lacks the weights {absent[0]}"
            + (f" and {len(absent) - 1} more" if len(absent) > 1 else ""),
            hint="the download is incomplete, or the config belongs to another model",
        )
    if device_map is not None:
        _check_device_map(getattr(model, "hf_device_map", {}))
    if shard is not None:
        _check_sharded(model)
    return BaseModel(reference, model, tokenizer, plan.dtype, _config_sha256(reference), quantisation)


def load_tokenizer(reference: BaseReference) -> Any:
    """The base model's tokenizer.

    Raises:
        BaseModelMismatch: if the directory has none that can be loaded.
    """
    from transformers import AutoTokenizer

    try:
        with _loading(reference):
            return AutoTokenizer.from_pretrained(reference.path, **_OFFLINE)
    except BaseModelMismatch as error:
        if any((reference.path / name).exists() for name in BASE_TOKENIZERS):
            raise
        raise BaseModelMismatch(
            f"the base model {reference.id} has no tokenizer: there is none of {', '.join(BASE_TOKENIZERS)}",
            hint="save it beside the model, with AutoTokenizer.from_pretrained(...).save_pretrained of the directory",
        ) from error


def check_fits(base: BaseModel, adapters: Sequence[LoraAdapter]) -> None:
    """Every module that an adapter changes must be in the base, of the same kind and shape, and such that adapters can
    be attached to it.

    Raises:
        BaseModelMismatch: naming adapter, module, what was expected and what was found.
    """
    check_shapes(base.model, adapters)
    check_experts(base.model, adapters)
    check_base_copies(adapters, lambda name: _whole(base.model.get_submodule(name).weight).cpu())


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


def _resolve_dtype(asked: str, own: object, device: str) -> torch.dtype:
    if asked != "auto":
        if asked not in DTYPES:
            raise UsageError(f"--dtype {asked} is not one of auto, {', '.join(DTYPES)}")
        return DTYPES[asked]
    dtype = own if isinstance(own, torch.dtype) else torch.float32
    if dtype == torch.float64:
        fast = has_float64(device)
    elif dtype == torch.bfloat16:
        fast = _has_bfloat16(device)
    else:
        fast = device != "cpu"
    return dtype if fast else torch.float32


def _has_bfloat16(device: str) -> bool:
    """Whether it computes in bfloat16 itself; a T4 or V100 does so in float32, and rounds."""
    kind = torch.device(device).type
    if kind == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return kind != "cpu" or _cpu_has_bfloat16()


def _cpu_has_bfloat16() -> bool:
    # Without these instructions bfloat16 on a CPU is 45 to 500 times slower than float32 (pytorch issue 146508).
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def plan_from_config(
    base: Named | BaseClaim, *, revision: str | None = None, task: str | None = None, progress: Progress = SILENT
) -> tuple[BasePlan, str]:
    """The plan of a base model, and the sha256 of its config.

    Args:
        base: as `locate_base` takes it; of one on the Hub only config.json is fetched.
        revision: of a base on the Hub.
        task: as for `plan_base`.
        progress: told of a download.
    Raises:
        InputError, UsageError: as `locate_base`.
        BaseModelMismatch: if transformers knows no such model.
        InputError, HubUnreachable: if the Hub does not give the config.
    """
    place = locate_base(base, revision=revision)
    if isinstance(place, Path):
        reference = BaseReference(str(base), place, None)
    else:
        try:
            fetched = fetch_base(str(place.base_model), revision=place.revision, config_alone=True, progress=progress)
        except (AccessDenied, HubUnreachable, InputError) as error:
            refuse_mistyped(base, error)
            if not isinstance(error, AccessDenied):
                error.hint = "; ".join(filter(None, [error.hint, WAY_OUT]))
            raise
        reference = BaseReference(fetched.repo_id, fetched.path, fetched.commit)
    plan = plan_base(reference, device="cpu", task=task)
    return plan, _config_sha256(reference)


def _config_sha256(reference: BaseReference) -> str:
    return sha256((reference.path / "config.json").read_bytes()).hexdigest()


def _placement_options(device: str, device_map: str | None, shard: int | None) -> dict[str, Any]:
    """What `from_pretrained` is told beside the usual; nothing, where the model goes to one device.

    Raises:
        UsageError: if the options contradict each other or the way this process was started.
    """
    if device_map is None and shard is None:
        return {}
    if device_map is not None and shard is not None:
        raise UsageError(
            "--device-map puts the base model on the devices of one process, --shard over several: give one"
        )
    processes = read_launch().world_size
    if shard is None:
        if device_map != "auto":
            raise UsageError(f"--device-map {device_map} is not in this version", hint="it has auto")
        if device != "auto":
            raise UsageError(f"--device-map auto chooses the devices: leave --device {device} out")
        if processes > 1:
            raise UsageError(
                f"--device-map auto is for one process, and these are {processes}",
                hint="leave torchrun out",
            )
        return {"device_map": "auto"}
    if shard < 2 or shard != processes:
        raise UsageError(
            f"the base model is to be sharded over {shard} processes, and there are {processes}",
            hint="start them with torchrun --nproc-per-node",
        )
    _check_shard_device(device)
    try:
        from transformers.distributed import DistributedConfig

        return {"distributed_config": DistributedConfig(fsdp_size=shard)}
    except (ImportError, TypeError) as error:
        raise UsageError("this version of transformers cannot shard a model", hint="upgrade transformers") from error


def _check_shard_device(device: str) -> None:
    """transformers shards over this machine's kind of accelerator, whatever else is asked for."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kind = "cpu" if accelerator is None else accelerator.type
    if device != "auto" and torch.device(device).type != kind:
        raise UsageError(f"--shard takes this machine's {kind} devices, not --device {device}: leave --device out")


def _check_device_map(device_map: Mapping[str, Any]) -> None:
    """Wants every layer on a device that computes.

    accelerate would bring the others in for the forward pass and take them away before the backward pass needs them.

    Raises:
        OutOfResources: naming the layers that found no place.
    """
    devices = {name: str(device) for name, device in device_map.items()}
    kinds = set(devices.values())
    idle = {"disk", "meta"} if kinds <= {"cpu", "disk", "meta"} else {"cpu", "disk", "meta"}
    left_over = [name for name, device in devices.items() if device in idle]
    if left_over:
        more = f" and {len(left_over) - 1} more" if len(left_over) > 1 else ""
        raise OutOfResources(
            f"the CUDA devices have no room for {left_over[0]}{more} of the base model: --device-map auto would keep "
            f"them on {devices[left_over[0]]}, and gradients through such layers are not reliable",
            hint="give --dtype bfloat16, more devices, or --device cpu",
        )


def _check_sharded(model: nn.Module) -> None:
    """Wants every decoder layer sharded, which transformers does for models whose layers it finds by name.

    Raises:
        UsageError: naming the model's class.
    """
    from torch.distributed.fsdp import FSDPModule

    layers = decoder_layers(model)
    if not layers or not all(isinstance(layer, FSDPModule) for layer in layers):
        name = type(model).__name__.removeprefix("FSDP")
        raise UsageError(
            f"transformers has no plan to shard the layers of a {name}",
            hint="leave --shard out, so that each process holds it whole; or --device-map auto without torchrun",
        )


def _whole(weight: Tensor) -> Tensor:
    """The weight, gathered from all processes where it is sharded: all must ask for it."""
    full: Any = getattr(weight, "full_tensor", None)
    gathered: Tensor = weight if full is None else full()
    return gathered
