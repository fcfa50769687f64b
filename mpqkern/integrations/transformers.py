"""Packed models of Hugging Face transformers: save_pretrained and from_pretrained as for float ones.

    import mpqkern.integrations.transformers as hf                      # registers quant_method "mpqkern"

    mq.swap_(model, plan); hf.annotate_(model); model.save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(folder)                        # the packed model, no float weight on the way
    AutoModelForCausalLM.from_pretrained(float_folder, quantization_config=hf.MpqConfig({"*": 4, "lm_head": None}))

The checkpoint holds the packed buffers as plain tensors; config.json the note of `mpqkern.notes` for every layer.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..catalog import candidates
from ..nn import PackedModule, swap_, unswap_
from ..notes import layer_notes, put_packed_layers
from ..planned import pairs_of, planned
from ..rounding import as_rounding
from ..scheme import Scheme
from ..select import type_pattern

log = logging.getLogger("mpqkern")

METHOD = "mpqkern"
FORMAT_VERSION = 1
LOADED = "_is_hf_initialized"  # transformers marks so what a checkpoint has filled, and draws random numbers elsewhere


@register_quantization_config(METHOD)
class MpqConfig(QuantizationConfigMixin):
    """What `from_pretrained` packs of a float checkpoint, and in a packed one's config.json what is packed.

    `plan` maps names, patterns or types to a `Scheme`, a bit width or None (stays in float), as in `mpqkern.swap_`;
    `rounding` is one that needs no data. `layers` holds the note of each packed layer by its exact name.

    >>> MpqConfig({"*": 4, "lm_head": None}).to_dict()["plan"]["*"]["bits"]
    4
    """

    def __init__(
        self,
        plan: Mapping[str | type, Scheme | int | Mapping[str, Any] | None] | Scheme | int | None = None,
        *,
        rounding: str = "minmax",
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = METHOD,
    ) -> None:
        if (plan is None) == (layers is None):
            raise ValueError("MpqConfig holds neither or both of plan and layers; wanted a plan, or a checkpoint's own")
        if type(format_version) is not int or format_version != FORMAT_VERSION:
            raise ValueError(f"format_version={format_version!r}; wanted {FORMAT_VERSION}")
        if not isinstance(rounding, str) or as_rounding(rounding).needs != "nothing":
            raise ValueError(
                f"rounding={rounding!r}; wanted one that needs no data, such as 'minmax' or 'mse': for others load the "
                "float model, then calibrate, swap_ and annotate_ it"
            )
        self.quant_method = quant_method
        self.format_version = format_version
        self.rounding = rounding
        if layers is not None:
            self.layers = {name: dict(note) for name, note in layers.items()}
        else:
            self.plan = _as_json(plan)

    def schemes(self) -> dict[str, Scheme | None]:
        """The plan as `mpqkern.swap_` takes it."""
        return {name: None if values is None else Scheme.from_dict(values) for name, values in self.plan.items()}


@register_quantizer(METHOD)
class MpqQuantizer(HfQuantizer):
    """How transformers' loader meets packed layers; made by `from_pretrained` and `annotate_`."""

    is_trainable = True  # inputs and bias have gradients: adapters can be trained around packed weights
    is_compileable = True
    quantization_config: MpqConfig

    def __init__(self, quantization_config: MpqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.waiting: dict[str, Scheme] = {}  # layers that are packed as soon as their weight is read

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """Asked for by save_pretrained: what config.json says is what the model is now."""
        model.config.quantization_config = self.quantization_config = _config_of(model)
        return None, {}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if self.pre_quantized:
            _put_layers(model, self.quantization_config)
            return
        found = candidates(model, on_meta=True)
        wanted = {name: scheme for name, scheme in planned(self.quantization_config.schemes(), found).items() if scheme}
        reasons = _ties(model) | {c.name: c.reason for c in found if c.reason}
        reasons = {name: reasons[name] for name in wanted if name in reasons}
        for name, reason in reasons.items():
            log.warning("%s stays in float: %s", name, reason)
        self.waiting = {name: scheme for name, scheme in wanted.items() if name not in reasons}
        if not self.waiting:
            why = "".join(f"; {name}: {reason}" for name, reason in list(reasons.items())[:3])
            raise ValueError(f"the plan of MpqConfig packs no layer of {type(model).__name__}{why}")

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        layer, _, key = param_name.rpartition(".")
        return key == "weight" and layer in self.waiting

    def get_quantize_ops(self) -> ConversionOps:
        return PackWhenRead(self)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, module in model.named_modules():
            if isinstance(module, PackedModule):
                _require_loaded(name, module, self.pre_quantized)
                module.derive_()
        for name in self.waiting:
            log.warning("%s stays in float: the checkpoint has no weight for it", name)
        self.get_state_dict_and_metadata(model)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        return unswap_(model).to(dtype)


class PackWhenRead(ConversionOps):
    """Packs one layer as soon as its float weight is there, so that there is never more than one of them."""

    def __init__(self, quantizer: MpqQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Tensor | list[Tensor]],
        *,
        model: PreTrainedModel,
        full_layer_name: str,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        (value,) = input_dict.values()
        name = full_layer_name.removesuffix(".weight")
        layer = model.get_submodule(name)
        layer.weight = nn.Parameter(value[0] if isinstance(value, list) else value, requires_grad=False)
        alone = nn.Sequential(layer)
        swap_(
            alone,
            {"0": self.quantizer.waiting[name]},
            rounding=self.quantizer.quantization_config.rounding,
            strict=True,
        )
        (new,) = alone
        if new.bias is not None and getattr(layer.bias, LOADED, False):
            setattr(new.bias, LOADED, True)
        parent, _, key = name.rpartition(".")
        model.get_submodule(parent)._modules[key] = new
        del self.quantizer.waiting[name]
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}


def annotate_(model: PreTrainedModel) -> MpqConfig:
    """Makes `save_pretrained` of a model with packed layers write what `from_pretrained` reads; returns the note.

    Once is enough: the note is made anew at every save.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model={type(model).__name__}; wanted a PreTrainedModel of transformers")
    model.config.quantization_config = _config_of(model)
    model.hf_quantizer = MpqQuantizer(model.config.quantization_config)
    model.is_quantized, model.quantization_method = True, METHOD
    return model.config.quantization_config


def _as_json(plan: Any) -> dict[str, dict[str, Any] | None]:
    written: dict[str, dict[str, Any] | None] = {}
    for pattern, value in pairs_of(plan).items():
        if isinstance(value, int) and not isinstance(value, bool):
            value = Scheme(value)
        elif isinstance(value, Mapping):  # from JSON
            value = Scheme.from_dict(value)
        if value is not None and not isinstance(value, Scheme):
            raise TypeError(f"plan[{pattern!r}]={value!r}; wanted a Scheme, 2, 4, 8 or None")
        if value is not None:
            value.require_packable()
        name = type_pattern(pattern) if isinstance(pattern, type) else pattern
        written[name] = None if value is None else value.to_dict()
    return written


def _config_of(model: PreTrainedModel) -> MpqConfig:
    """The note of each layer, and beside it which of the optional tensors there are."""
    layers = layer_notes(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no packed layer; wanted one that mpqkern.swap_ has packed")
    users: dict[int, str] = {}
    for name, note in layers.items():
        module = model.get_submodule(name)
        other = users.setdefault(module.qweight.untyped_storage().data_ptr(), name)
        if other != name:
            raise ValueError(
                f"layers {other!r} and {name!r} share one packed weight, which transformers' checkpoints cannot tell; "
                "wanted None for them in the plan, or mpqkern.save"
            )
        scale = module.act_scale
        note |= {"bias": module.bias is not None, "act_scale": None if scale is None else len(scale)}
    return MpqConfig(layers=layers)


def _put_layers(model: PreTrainedModel, config: MpqConfig) -> None:
    """Empty packed layers where the checkpoint has packed ones; in the type that the model is loaded in."""
    notes, optional = {}, {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for saved, entry in config.layers.items():
        name = _name_in(model, saved, modules)
        if name is None:
            continue
        note = dict(entry)
        if note.pop("bias", False):
            optional[f"{name}.bias"] = ((), torch.float32)  # only its being there is asked for
        scales = note.pop("act_scale", None)
        if scales is not None:
            optional[f"{name}.act_scale"] = ((scales,), torch.float32)
        weight = modules[name]._parameters.get("weight") if name in modules else None
        if weight is not None:
            note["dtype"] = str(weight.dtype).removeprefix("torch.")
        notes[name] = note
    put_packed_layers(model, notes, optional.get, partial(_not_fitting, model))


def _name_in(model: PreTrainedModel, saved: str, modules: Mapping[str, nn.Module]) -> str | None:
    """A layer's name in a model that may be the saved one's trunk, or have it for its trunk; None: not in a trunk."""
    prefix = f"{model.base_model_prefix}."
    names = (saved, saved.removeprefix(prefix), prefix + saved)
    name = next((name for name in names if name in modules), None)
    if name is None and type(model).__name__ not in (model.config.architectures or [type(model).__name__]):
        log.info("%s of the checkpoint is not in a %s", saved, type(model).__name__)
        return None
    return name or saved


def _ties(model: PreTrainedModel) -> dict[str, str]:
    """Which layers share their weight, by what transformers says: it makes them one only after loading."""
    ties = model.all_tied_weights_keys
    both = [*ties.items(), *((source, target) for target, source in ties.items())]
    return {one.removesuffix(".weight"): f"its weight is tied to {other}" for one, other in both}


def _require_loaded(name: str, module: PackedModule, packed: bool) -> None:
    """Every buffer from the checkpoint: one that was not there would hold whatever memory held."""
    for key, tensor in module.named_buffers(recurse=False):
        if getattr(tensor, LOADED, False) or (not packed and key != "bias"):
            continue
        if packed:
            raise ValueError(f"tensor '{name}.{key}' is not in the checkpoint, but its layer is packed in config.json")
        tensor.zero_()  # as transformers does with a bias that a float checkpoint lacks


def _not_fitting(model: PreTrainedModel, message: str) -> ValueError:
    return ValueError(f"quantization_config does not fit {type(model).__name__}: {message}")
