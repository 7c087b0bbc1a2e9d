"""What PEFT's `adapter_config.json` says of an adapter, and whether it is plain LoRA."""

import math
import re
from pathlib import Path
from typing import NamedTuple

from l32jax.checkpoint.adapters import MAX_RANK
from l32jax.checkpoint.fields import Fields, read_json
from l32jax.config_text import short
from l32jax.errors import InputError

CONFIG = "adapter_config.json"
MAX_PATTERNS, MAX_PATTERN_LENGTH = 1024, 500  # far above those in use; they bound the matching

# With these, PEFT 0.21 computes something else than W + scale * B @ A.
BEYOND_LORA = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)
# Where training began; all other ways (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change W as well.
WITH_W_KEPT = (True, None, "gaussian", "eva", "orthogonal", "mica")
# About training, or about places; what they say of tensors, names and shapes say too.
HARMLESS = (
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "target_modules",
    "task_type",
)


class PeftSettings(NamedTuple):
    """What the config says of modules; `alphas` are for those whose names match, the first wins."""

    ranks: set[int]
    alpha: float
    alphas: list[tuple[re.Pattern, float]]
    rank_stabilized: bool

    def scale(self, module: str, rank: int) -> float:
        matching = (alpha for pattern, alpha in self.alphas if pattern.match(module))
        return next(matching, self.alpha) / (math.sqrt(rank) if self.rank_stabilized else rank)


def read_settings(path: Path) -> PeftSettings:
    """InputError for whatever may be more than LoRA; a key that is null, false or empty is not."""
    content = {name: value for name, value in read_json(path).items() if value}
    if beyond := [name for name in BEYOND_LORA if name in content]:
        name = beyond[0]
        raise InputError(
            f"adapter in {path}: {name!r} is {short(content[name])}, but only plain LoRA is read; "
            "merge it with PEFT, and convert the merged model"
        )
    fields = Fields(content, str(path), HARMLESS)
    if fields.get("peft_type") != "LORA":
        fields.refuse("peft_type", "'LORA', the only kind that is read; merge others with PEFT")
    if fields.get("init_lora_weights") not in WITH_W_KEPT:
        fields.refuse("init_lora_weights", "a way that keeps the base as it is; merge with PEFT")
    ranks = Fields(fields.get("rank_pattern") or {}, f"rank_pattern in {path}")
    settings = PeftSettings(
        {fields.size("r", at_most=MAX_RANK)}
        | {ranks.size(name, at_most=MAX_RANK) for name in ranks.values},
        fields.number("lora_alpha"),
        _alphas(fields),
        bool(fields.get("use_rslora")),
    )
    fields.close()
    return settings


def _alphas(fields: Fields) -> list[tuple[re.Pattern, float]]:
    alphas = Fields(fields.get("alpha_pattern") or {}, f"alpha_pattern in {fields.where}")
    if len(alphas.values) > MAX_PATTERNS:
        fields.refuse("alpha_pattern", f"at most {MAX_PATTERNS} patterns")
    return [(_pattern(name, alphas.where), alphas.number(name)) for name in alphas.values]


def _pattern(text: str, where: str) -> re.Pattern:
    """Matches a module's name as PEFT does. InputError for what could match forever."""
    repeats, groups = len(re.findall(r"[*+]", text)), text.count("(")
    forever = repeats > 1 or groups > 1 or re.search(r"\)[*+]|[?{]", text)
    try:
        if not forever and len(text) <= MAX_PATTERN_LENGTH:
            return re.compile(rf"(.*\.)?({text})$")
        why = "only simple patterns are read"
    except re.error as error:
        why = f"no regular expression ({error})"
    raise InputError(f"{short(text)} in {where}: {why}; give the names of modules instead")
