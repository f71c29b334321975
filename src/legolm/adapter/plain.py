"""What the config of a PEFT LoRA means: which modules it is on, at which rank and scale.

PEFT's own matching decides. Known are the fields that leave an adapter B·A; one with any other is refused, for it is
more than B·A, or goes on other weights than the base model's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from legolm.errors import LegolmError, brief
from legolm.models import Shape

MERGE = "merge it with PEFT (merge_and_unload, then save_pretrained) and give the merged model"
MEANINGLESS = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "runtime_config", "megatron_core", "ensure_weight_tying"),
    # Of the start, which `check_base` looks at.
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
    "fan_in_fan_out",  # PEFT sets it to what the layer is
    *("lora_dtype", "lorap_lr_ratio", "lorap_emb_lr"),  # ms-swift's, of the training
}
"""Fields that change nothing of B·A."""
MORE = {
    "use_dora": "DoRA scales each row of W + B·A anew",
    "modules_to_save": "whole modules were trained beside B·A",
    "bias": "biases were trained beside B·A",
    "lora_bias": "B has a bias",
    "trainable_token_indices": "embeddings of tokens were trained beside B·A",
    "target_parameters": "it is on parameters that are no linear layers",
    "layer_replication": "its model has layers more than once",
    "kasa_config": "KaSA takes singular values out of the base model's weights",
    "use_qalora": "its A takes means of inputs",
    "use_bdlora": "its factors are block diagonals",
    "monteclora_config": "its factors are drawn anew",
    "arrow_config": "it chooses among adapters token by token",
}
"""Fields of adapters that are more than B·A, and how."""
PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights`, beside true and false, that leave the base model as it is."""
MAX_PATTERN, MAX_REPEATS = 1000, 6
"""Signs of a pattern, and repeats in it: PEFT matches it with every module's name."""


class Fields(BaseModel):
    """The fields that decide where a LoRA is and how much it counts, with PEFT's defaults."""

    model_config = ConfigDict(strict=True)

    r: int = 8
    lora_alpha: float = 8
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool | None = None
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None


class Plain:
    """A LoRA that is nothing but B·A on linear layers of a block, `layers` deep; modules by their names in the model.

    `config` is what `adapter_config` read. Raises `LegolmError`, which begins with `where`, for any other.
    """

    def __init__(self, config: Mapping[str, Any], where: str, shape: Shape, layers: int) -> None:
        from peft import LoraConfig
        from peft.tuners.tuners_utils import check_target_module_exists

        _check_kind(config, where)
        prefix, self._where = shape.entry.layers, where
        names = [f"{prefix}.{place}.{module}" for place in range(layers) for module in shape.modules]
        try:
            given = Fields.model_validate(dict(config))
            targets = _targets(given, shape.family, names)
            fields = given.model_dump(exclude_none=True) | {"target_modules": targets}
            self._config: Any = LoraConfig(**fields)
            self._on = {name for name in names if check_target_module_exists(self._config, name)}
        except ValidationError as error:
            first = error.errors()[0]
            said = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            raise LegolmError(f"{where}: adapter_config.json: {brief(said)}; give a config that PEFT wrote") from None
        except (ValueError, TypeError) as error:
            raise LegolmError(f"{where}: adapter_config.json: {brief(error)}; give a config that PEFT wrote") from None

    def check_modules(self, found: set[str]) -> None:
        """Raise `LegolmError` unless the file has factors of just the modules that the config says."""
        for name in sorted(found - self._on):
            raise LegolmError(
                f"{self._where}: has factors of {name}, where adapter_config.json puts none (target_modules, "
                "exclude_modules, layers_to_transform): PEFT leaves them out; mend the config"
            )
        for name in sorted(self._on - found):
            raise LegolmError(
                f"{self._where}: has no factors of {name}, where adapter_config.json puts some; give the whole "
                "adapter, of a model of as many layers"
            )

    def rank(self, name: str) -> int:
        """LoRA rank of a module."""
        return int(_of_pattern(self._config.rank_pattern, name, self._config.r))

    def scale(self, name: str) -> float:
        """What PEFT multiplies B·A of a module by."""
        alpha, rank = _of_pattern(self._config.alpha_pattern, name, self._config.lora_alpha), self.rank(name)
        return float(alpha / (rank**0.5 if self._config.use_rslora else rank))


def check_base(config: Mapping[str, Any], where: str) -> None:
    """Raise `LegolmError` when the adapter goes on other weights than the base model's: PEFT changed them at its start.

    PiSSA, OLoRA, CorDA and LoRA-GA take the first B·A out of the base, LoftQ quantizes it.
    """
    start = config.get("init_lora_weights")
    if start is None or isinstance(start, bool) or str(start).lower() in PLAIN_STARTS:
        return
    said = f"{where}: init_lora_weights is {brief(repr(start))}, whose start changes the base model's weights"
    if str(start).lower() == "loftq":
        raise LegolmError(f"{said}: it quantizes them; {MERGE}")
    raise LegolmError(
        f"{said}; save it with PEFT's save_pretrained(…, path_initial_model_for_weight_conversion=FOLDER), FOLDER with "
        f"the adapter as it was before training, or {MERGE}"
    )


def check_patterns(config: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a pattern of a config that is none, or may take for ever to match."""
    for pattern in _patterns(config):
        bare = re.sub(r"\\.|\[[^]]*\]", "x", pattern)  # no escapes and classes
        repeats = len(re.findall(r"[*+{]", bare))
        if len(pattern) > MAX_PATTERN or repeats > MAX_REPEATS or re.search(r"\)[*+{]", bare):
            raise ValueError(f"the pattern {brief(pattern)} repeats a group, repeats too often or is too long")
        try:
            re.compile(pattern)
        except (re.error, OverflowError) as error:
            raise ValueError(f"the pattern {brief(pattern)} is none: {error}") from None


def _patterns(config: Mapping[str, Any]) -> Iterator[str]:
    """What PEFT takes for regular expressions."""
    for field in ("rank_pattern", "alpha_pattern", "layers_pattern", "modules_to_save"):
        found = config.get(field) or ()
        yield from (str(one) for one in ([found] if isinstance(found, str) else found))
    for field in ("target_modules", "exclude_modules"):
        if isinstance(found := config.get(field), str):
            yield found


def _check_kind(config: Mapping[str, Any], where: str) -> None:
    """Raise `LegolmError` for what is more than B·A."""
    if config.get("peft_type") != "LORA":
        said = brief(str(config.get("peft_type")))
        raise LegolmError(f"{where}: is {said}; only LoRA adapters can be averaged; {MERGE}")
    for field, value in config.items():
        if field in MEANINGLESS or field in Fields.model_fields or not value or value == "none":
            continue
        said = f"{where}: {brief(field)} is {brief(repr(value))}"
        if field == "alora_invocation_tokens":
            raise LegolmError(
                f"{said}: aLoRA changes tokens after these only, which no merged weights do; leave it out"
            )
        if field in MORE:
            raise LegolmError(f"{said}: {MORE[field]}, and only B·A can be averaged; {MERGE}")
        raise LegolmError(f"{said}, a field not known here; set it to null if it changes no weights, or {MERGE}")


def _targets(given: Fields, family: str, names: list[str]) -> str | list[str]:
    """The modules that PEFT takes where the config names none, and for its word for all but the head."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    if given.target_modules is None:
        return list(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(family, []))
    if isinstance(given.target_modules, str) and given.target_modules.lower() == "all-linear":
        return names
    return given.target_modules


def _of_pattern(pattern: Mapping[str, float], name: str, usual: float) -> float:
    """What the first pattern that fits says of a module, as PEFT matches."""
    from peft.utils.other import get_pattern_key

    return pattern.get(get_pattern_key(list(pattern), name), usual)
