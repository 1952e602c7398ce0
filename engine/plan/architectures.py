"""The architectures of mixtures: which dense models become one, how its tensors are called, what its config says.

Names and keys are those of the models on the Hub (mistralai/Mixtral-8x7B-v0.1, deepseek-ai/deepseek-moe-16b-base,
Qwen/Qwen1.5-MoE-A2.7B, Qwen/Qwen3-30B-A3B), which transformers 4 and 5, vLLM and llama.cpp read.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergemill.engine.checkpoint.config import REMOVED, Changes
from mergemill.engine.errors import PlanError

MATRICES = ("gate_proj", "up_proj", "down_proj")  # of an MLP
PACKED = ("gate_up_proj", "down_proj")  # of all experts, as transformers 5 has them


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the numbers of a mixture's config are made of."""

    experts: int  # all that the router chooses from
    chosen: int  # for a token
    shared: int
    granularity: int  # experts that an MLP is cut into
    channels: int  # of a whole MLP


@dataclass(frozen=True, slots=True)
class Architecture:
    """One kind of mixture."""

    name: str
    takes: tuple[str, ...]  # model types of dense models
    module: str  # of a layer, that holds experts and router
    called: Mapping[str, str]  # an MLP's matrices among an expert's
    shared_name: str  # of the shared experts, after the module; empty: it has none
    shared_gate: str  # of the row that weighs the shared one
    least_shared: int
    most_shared: int
    biases: tuple[str, ...]  # of a layer, that it has always: zeros where the base has none
    may_bias: tuple[str, ...]  # that it has where the config says so
    model_type: str
    class_name: str

    def name_expert(self, number: int, matrix: str) -> str:
        """Return an expert's matrix, after its layer's name.

        >>> MIXTRAL.name_expert(3, "up_proj")
        'block_sparse_moe.experts.3.w3.weight'
        """
        return f"{self.module}.experts.{number}.{self.called[matrix]}.weight"

    def name_packed(self, matrix: str) -> str:
        """Return what holds a matrix of all experts, after its layer's name."""
        return f"mlp.experts.{matrix}"

    def name_router(self, *, packed: bool) -> str:
        """Return the router, after its layer's name."""
        return f"{'mlp' if packed else self.module}.gate.weight"

    def name_shared(self, matrix: str) -> str:
        """Return a matrix of the shared experts, after their layer's name."""
        return f"{self.module}.{self.shared_name}.{matrix}.weight"


_PLAIN = {matrix: matrix for matrix in MATRICES}
_ATTENTION = tuple(f"self_attn.{each}_proj.bias" for each in "qkvo")

MIXTRAL = Architecture(
    name="mixtral",
    takes=("llama", "mistral"),
    module="block_sparse_moe",
    called={"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    shared_name="",
    shared_gate="",
    least_shared=0,
    most_shared=0,
    biases=(),
    may_bias=(),
    model_type="mixtral",
    class_name="MixtralForCausalLM",
)
DEEPSEEK = Architecture(
    name="deepseek",
    takes=("llama", "mistral"),
    module="mlp",
    called=_PLAIN,
    shared_name="shared_experts",
    shared_gate="",
    least_shared=0,
    most_shared=1 << 16,
    biases=(),
    may_bias=_ATTENTION,
    model_type="deepseek",
    class_name="DeepseekForCausalLM",
)
QWEN2 = Architecture(
    name="qwen",
    takes=("llama", "mistral", "qwen2"),
    module="mlp",
    called=_PLAIN,
    shared_name="shared_expert",
    shared_gate="mlp.shared_expert_gate.weight",
    least_shared=1,
    most_shared=1,
    biases=_ATTENTION[:3],
    may_bias=(),
    model_type="qwen2_moe",
    class_name="Qwen2MoeForCausalLM",
)
QWEN3 = Architecture(
    name="qwen3",
    takes=("qwen3",),
    module="mlp",
    called=_PLAIN,
    shared_name="",
    shared_gate="",
    least_shared=0,
    most_shared=0,
    biases=(),
    may_bias=_ATTENTION,
    model_type="qwen3_moe",
    class_name="Qwen3MoeForCausalLM",
)

KNOWN = {
    "mixtral": (MIXTRAL, "mixtral"),
    "deepseek": (DEEPSEEK, "deepseek moe"),
    "qwen": (QWEN2, "qwen moe"),
    "qwen3": (QWEN3, "qwen3 moe"),
}
"""Each with the name that mergekit has for it."""

_DEEPSEEK_CODE = "deepseek-ai/deepseek-moe-16b-base--"


def choose_architecture(asked: str | None, model_type: str, shared: int, *, where: str) -> Architecture:
    """Return the first architecture that `asked` is the beginning of and that fits; `PlanError` says why none does.

    model_type: of the base model. shared: how many shared experts there are.
    """
    wanted = asked or ""
    named = [each for name, (each, long) in KNOWN.items() if name.startswith(wanted) or long.startswith(wanted)]
    fitting = [each for each in named if not list(_find_misfits(each, model_type, shared))]
    if fitting:
        return fitting[0]
    taking = [each for each in named if model_type in each.takes]
    why = "; ".join(
        f"{each.name} {fault}" for each in taking or named for fault in _find_misfits(each, model_type, shared)
    )
    raise PlanError(f"{where}: no architecture of a mixture fits: {why}")


def _find_misfits(architecture: Architecture, model_type: str, shared: int) -> Iterator[str]:
    if model_type not in architecture.takes:
        yield f"takes models of type {' or '.join(architecture.takes)}, and the base model is {model_type or 'of none'}"
    elif not architecture.least_shared <= shared <= architecture.most_shared:
        least = architecture.least_shared
        wanted = f"exactly {least}" if least == architecture.most_shared else f"at least {least}"
        has = "no shared experts" if not architecture.most_shared else f"{wanted} of shared_experts"
        yield f"has {has}, and here are {shared}"


def make_changes(architecture: Architecture, config: Mapping[str, Any], sizes: Sizes) -> Changes:
    """Return what the base's config changes in."""
    fine = sizes.channels // sizes.granularity
    changes: Changes = {
        ("architectures",): [architecture.class_name],
        ("model_type",): architecture.model_type,
        ("auto_map",): REMOVED,
        ("num_experts_per_tok",): sizes.chosen * sizes.granularity,
    }
    own = {"mixtral": _of_mixtral, "deepseek": _of_deepseek, "qwen": _of_qwen2, "qwen3": _of_qwen3}
    return changes | {(key,): value for key, value in own[architecture.name](sizes, fine, config).items()}


def _of_mixtral(sizes: Sizes, fine: int, config: Mapping[str, Any]) -> dict[str, Any]:
    return {"num_local_experts": sizes.experts, "intermediate_size": fine, "sliding_window": None}


def _of_deepseek(sizes: Sizes, fine: int, config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "n_routed_experts": sizes.experts,
        "n_shared_experts": sizes.shared * sizes.granularity or None,  # of moe_intermediate_size channels each
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "scoring_func": "softmax",
        "norm_topk_prob": True,
        "moe_intermediate_size": fine,
        "auto_map": {
            "AutoConfig": f"{_DEEPSEEK_CODE}configuration_deepseek.DeepseekConfig",
            "AutoModel": f"{_DEEPSEEK_CODE}modeling_deepseek.DeepseekModel",
            "AutoModelForCausalLM": f"{_DEEPSEEK_CODE}modeling_deepseek.DeepseekForCausalLM",
        },
    }


def _of_qwen2(sizes: Sizes, fine: int, config: Mapping[str, Any]) -> dict[str, Any]:
    types = config.get("layer_types")
    full = {"layer_types": ["full_attention"] * len(types)} if isinstance(types, list) else {}
    return {
        "num_experts": sizes.experts,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "moe_intermediate_size": fine,
        "shared_expert_intermediate_size": sizes.channels,
        "use_sliding_window": False,
        **full,
    }


def _of_qwen3(sizes: Sizes, fine: int, config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_experts": sizes.experts,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "moe_intermediate_size": fine,
    }


def warn_of_loaders(architecture: Architecture, experts: int, *, packed: bool, where: str) -> Sequence[str]:
    """Return what is to be known of who reads the output."""
    told = []
    if architecture is DEEPSEEK:
        told.append(
            f"{where}: transformers loads a {architecture.model_type} with the classes of "
            f"{_DEEPSEEK_CODE.removesuffix('--')} alone, which its user must trust; vLLM and llama.cpp know it"
        )
    if packed:
        told.append(f"{where}: layout packed is read by transformers 5; vLLM, llama.cpp and transformers 4 do not")
    if experts & (experts - 1):
        told.append(f"{where}: {experts} experts are no power of two, which some converters of llama.cpp want")
    return told
