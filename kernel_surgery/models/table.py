"""The architectures that are known: where each keeps its decoder layers and what writes the MLP block's output.

One row per model type. Everything else in the project reads this table, so a model is added by a row and a pico test
(docs/models.md says how). The edit is made on the MLP block's output, before it is added to the residual stream.

Source: the model files of transformers 5.23, and checkpoints that its `save_pretrained` writes.
"""

import re
from collections.abc import Container
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Form:
    """How one kind of tensor that writes into the MLP block's output is held.

    path: of the tensor, from its layer on. "*" stands for the number of an expert.
    role: "dense", "expert" or "shared". A layer has either "dense" or "expert" tensors; "shared" are experts that every
    token passes. A tensor in memory and one in a file are the same if role, bias and the expert's number agree.
    bias: it is a bias [d_model]. Otherwise it is a matrix [d_model, d_ff].
    transposed: the matrix is [d_ff, d_model].
    stacked: the experts' matrices (or biases) are one tensor, along its first axis.
    """

    path: str
    role: str = "dense"
    bias: bool = False
    transposed: bool = False
    stacked: bool = False


Forms = tuple[Form, ...]


def linear(module: str, role: str = "dense", transposed: bool = False) -> Forms:
    """The weight of a linear module, and its bias if it has one. transposed: it is a Conv1D of transformers."""
    return Form(f"{module}.weight", role, transposed=transposed), Form(f"{module}.bias", role, bias=True)


_DOWN_PROJ = linear("mlp.down_proj")


def holder(name: str) -> str:
    """Return what holds a bias: the name without ".bias", or without "_bias" before an expert's number."""
    return re.sub(r"\.bias$|_bias(?=\[\d+\]$)", "", name)


@dataclass(frozen=True)
class Part:
    """One matrix or bias that the edit changes. name: of the tensor in memory; "[3]" after it is the third expert's."""

    layer: int
    name: str
    form: Form


@dataclass(frozen=True)
class Layout:
    """The parts of a causal LM of one model type. A path names a module, and is the prefix of its tensors' names.

    layers: the list of decoder layers.
    site: the module whose output is edited, from its layer on. It may return a tuple; the output is its first element.
    writes: how the tensors that write into that output are held in memory. A layer has those that exist in it.
    files: other forms that they may have in the files.
    bodies: other paths in the files of what runs the layers; "" if the names begin with those of its parts.
    embedding, norm: from the body on. The norm follows the last layer. head: the output embedding.
    input_norm, mlp_norm: from the layer on. They give what attention and the MLP block read; None: there is no norm.
    follows: what is done with the output. "residual": it is added to the residual stream. "norm": a norm comes first,
    so what is added is not linear in the output. "parallel": it is added together with attention's.
    after: the norm that reads the output, from its layer on.
    scaled: the output is multiplied by this number of the configuration before it is added.
    vllm: the path of the site in vLLM, with "*" for the layer's number; "" if it is the same.
    stacked_adapter: an adapter's experts are stacked, also if those of the files are not.
    parallel_if: a switch of the configuration. Without it the output is added after attention's has been.
    bypassed: a switch of the configuration with which the model computes the output without calling the site.
    inner: the model types that the language model inside may have; none: its own alone.
    plain: the layer is x + block(mlp_norm(x)) with x = input + attention(input_norm(input)), and nothing else. Then the
    fused operators can include the addition, and the next norm if it is an RMSNorm without an offset of its weight.
    """

    layers: str = "model.layers"
    site: str = "mlp.down_proj"
    writes: Forms = _DOWN_PROJ
    files: Forms = ()
    bodies: tuple[str, ...] = ("",)
    embedding: str = "embed_tokens"
    norm: str = "norm"
    head: str = "lm_head"
    input_norm: str | None = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    follows: str = "residual"
    after: str | None = None
    scaled: str | None = None
    vllm: str = ""
    stacked_adapter: bool = False
    parallel_if: str | None = None
    bypassed: str | None = None
    inner: tuple[str, ...] = ()
    plain: bool = False

    @property
    def remark(self) -> str | None:
        """What every output says of an edit of the MLP block's output in such a model, or None."""
        if self.follows != "norm":
            return None
        return (
            "a norm follows the edited output: what a layer adds to the residual stream is not linear in it, and may "
            "hold the removed directions again (site mlp_write is after the norm)"
        )

    @property
    def body(self) -> str:
        """The path of the module that runs the layers: the causal LM without its output embedding."""
        return self.layers.rpartition(".")[0]

    @property
    def linear(self) -> bool:
        """Whether the site is a linear module, not a block that may hold several."""
        return any(form.path == f"{self.site}.weight" for form in self.writes)

    def embedding_name(self) -> str:
        """Return the name of the embedding's weight."""
        return f"{self.body}.{self.embedding}.weight"

    def layer(self, index: int | str) -> str:
        """Return the path of a decoder layer. "*" stands for any layer."""
        return f"{self.layers}.{index}"

    def site_name(self, index: int | str) -> str:
        """Return the path of the module whose output is edited. "*" stands for any layer."""
        return f"{self.layers}.{index}.{self.site}"

    def vllm_site(self, index: int | str) -> str:
        """Return the path of the site in vLLM's model. "*" stands for any layer."""
        return self.vllm.replace("*", str(index)) if self.vllm else self.site_name(index)

    @property
    def vllm_body(self) -> str:
        """The path of the body in vLLM's model."""
        return self.vllm.partition(".*.")[0].rpartition(".")[0] if self.vllm else self.body

    def next_norm(self, index: int, n_layers: int) -> str | None:
        """Return the path of the norm that reads a layer's output, or None if attention reads it as it is."""
        if index + 1 == n_layers:
            return f"{self.body}.{self.norm}"
        return f"{self.layer(index + 1)}.{self.input_norm}" if self.input_norm else None

    def name_of(self, layer: int, form: Form, expert: int | None) -> str:
        """Return the name in memory of a part that is held in `form`, in memory or in a file."""
        kept = next((own for own in self.writes if (own.role, own.bias) == (form.role, form.bias)), form)
        if kept.stacked:
            return f"{self.layer(layer)}.{kept.path}[{expert}]"
        return f"{self.layer(layer)}.{kept.path.replace('*', str(expert))}"

    def stored(self, tensor: str, layers: Container[int]) -> tuple[int, Form, int | None] | None:
        """Return what a tensor of a file is: its layer, its form, and the number of its expert if its name says one.

        None for a tensor that an edit of `layers` does not change.
        """
        match = re.fullmatch(rf"{re.escape(self.layers)}\.(\d+)\.(.+)", tensor)
        if not match or int(match[1]) not in layers:
            return None
        for form in dict.fromkeys((*self.files, *self.writes)):
            if found := re.fullmatch(re.escape(form.path).replace(r"\*", r"(\d+)"), match[2]):
                return int(match[1]), form, int(found[1]) if found.groups() else None
        return None


_EXPERT = Form("mlp.experts.*.down_proj.weight", "expert")
_STACKED = Form("mlp.experts.down_proj", "expert", stacked=True)
# How the block of a mixture of experts is held: routed experts stacked in memory and one by one in the files, a shared
# expert, and a plain MLP in the layers that are dense.
_MIXED = Layout(site="mlp", writes=(_STACKED, *linear("mlp.down_proj")), files=(_EXPERT,))


def _shared(name: str) -> Layout:
    return replace(_MIXED, writes=(*_MIXED.writes, *linear(f"mlp.{name}.down_proj", "shared")))


_QWEN3_5_MOE = replace(_shared("shared_expert"), stacked_adapter=True)
LLAMA = Layout(plain=True)
_NORMED = Layout(follows="norm", after="post_feedforward_layernorm", mlp_norm="pre_feedforward_layernorm")
_PARALLEL = Layout(follows="parallel")
_GPT2 = Layout(
    layers="transformer.h",
    site="mlp.c_proj",
    writes=linear("mlp.c_proj", transposed=True),
    embedding="wte",
    norm="ln_f",
    input_norm="ln_1",
    mlp_norm="ln_2",
)
_BLOOM = replace(
    _GPT2,
    site="mlp.dense_4h_to_h",
    writes=linear("mlp.dense_4h_to_h"),
    embedding="word_embeddings",
    input_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
)
_LLAMA4 = Layout(
    site="feed_forward",
    writes=(
        Form("feed_forward.experts.down_proj", "expert", stacked=True, transposed=True),
        *linear("feed_forward.down_proj"),
        *linear("feed_forward.shared_expert.down_proj", "shared"),
    ),
    files=(Form("feed_forward.experts.*.down_proj.weight", "expert"),),
)


def _inside(layout: Layout, body: str, head: str, *bodies: str) -> Layout:
    """The layout of a model of several modalities, with the language model's body at `body`. bodies: in its files.

    vLLM has its body at one path in all of them.
    """
    served = f"language_model.model.layers.*.{layout.site}"
    return replace(layout, layers=f"{body}.layers", head=head, bodies=bodies, vllm=served)


# {model_type in config.json: layout}, one entry per supported architecture.
ARCHITECTURES: dict[str, Layout] = {
    **dict.fromkeys(("llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3"), LLAMA),
    **dict.fromkeys(("smollm3", "ernie4_5", "seed_oss", "arcee"), LLAMA),
    **dict.fromkeys(("phi3", "olmo", "glm", "hunyuan_v1_dense", "nemotron", "helium", "qwen3_5_text"), Layout()),
    "apertus": Layout(input_norm="attention_layernorm", mlp_norm="feedforward_layernorm"),
    "granite": Layout(scaled="residual_multiplier"),
    "starcoder2": Layout(site="mlp.c_proj", writes=linear("mlp.c_proj")),
    "lfm2": Layout(
        site="feed_forward.w2",
        writes=linear("feed_forward.w2"),
        norm="embedding_norm",
        input_norm="operator_norm",
        mlp_norm="ffn_norm",
    ),
    **dict.fromkeys(("gemma2", "gemma3_text"), _NORMED),
    "gemma": Layout(),
    **dict.fromkeys(("olmo2", "olmo3", "exaone4"), replace(_NORMED, input_norm=None, mlp_norm=None)),
    "glm4": replace(_NORMED, after="post_mlp_layernorm", mlp_norm="post_attention_layernorm"),
    **dict.fromkeys(("cohere", "cohere2"), replace(_PARALLEL, mlp_norm="input_layernorm")),
    "phi": replace(
        _PARALLEL, site="mlp.fc2", writes=linear("mlp.fc2"), norm="final_layernorm", mlp_norm="input_layernorm"
    ),
    "gpt_neox": replace(
        _PARALLEL,
        layers="gpt_neox.layers",
        site="mlp.dense_4h_to_h",
        writes=linear("mlp.dense_4h_to_h"),
        embedding="embed_in",
        norm="final_layer_norm",
        parallel_if="use_parallel_residual",
        vllm="model.layers.*.mlp.dense_4h_to_h",
    ),
    "stablelm": replace(_PARALLEL, parallel_if="use_parallel_residual"),
    "gptj": replace(_GPT2, site="mlp.fc_out", writes=linear("mlp.fc_out"), mlp_norm="ln_1", follows="parallel"),
    "gpt_bigcode": replace(_GPT2, writes=linear("mlp.c_proj"), vllm="model.h.*.mlp.c_proj"),
    "persimmon": Layout(site="mlp.dense_4h_to_h", writes=linear("mlp.dense_4h_to_h"), norm="final_layernorm"),
    "falcon": replace(_BLOOM, follows="parallel", parallel_if="parallel_attn"),
    "gpt2": _GPT2,
    "bloom": replace(_BLOOM, bypassed="slow_but_exact"),
    "mpt": Layout(
        layers="transformer.blocks",
        site="ffn.down_proj",
        writes=linear("ffn.down_proj"),
        embedding="wte",
        norm="norm_f",
        input_norm="norm_1",
        mlp_norm="norm_2",
    ),
    **dict.fromkeys(("qwen3_moe", "olmoe"), _MIXED),
    "flex_olmo": replace(_MIXED, follows="norm", after="post_feedforward_layernorm", input_norm=None, mlp_norm=None),
    **dict.fromkeys(
        ("mixtral", "minimax_m2", "phimoe"),
        replace(
            _MIXED,
            files=(Form("block_sparse_moe.experts.*.w2.weight", "expert"),),
            vllm="model.layers.*.block_sparse_moe",
        ),
    ),
    **dict.fromkeys(("qwen2_moe", "qwen3_next"), _shared("shared_expert")),
    "qwen3_5_moe_text": _QWEN3_5_MOE,
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe", "glm4_moe_lite"), _shared("shared_experts")),
    **dict.fromkeys(("ernie4_5_moe", "solar_open"), _shared("shared_experts")),
    "afmoe": replace(
        _shared("shared_experts"), follows="norm", after="post_mlp_layernorm", mlp_norm="pre_mlp_layernorm"
    ),
    "hunyuan_v1_moe": _shared("shared_mlp"),
    "granitemoe": Layout(
        site="block_sparse_moe",
        writes=(Form("block_sparse_moe.experts.down_proj", "expert", stacked=True),),
        files=(Form("block_sparse_moe.output_linear.weight", "expert", stacked=True),),
        scaled="residual_multiplier",
    ),
    "gpt_oss": Layout(
        site="mlp",
        writes=(
            Form("mlp.experts.down_proj", "expert", stacked=True, transposed=True),
            Form("mlp.experts.down_proj_bias", "expert", stacked=True, bias=True),
        ),
    ),
    "llama4_text": _LLAMA4,
    "llama4": _inside(_LLAMA4, "language_model.model", "language_model.lm_head"),
    "gemma3": _inside(_NORMED, "model.language_model", "lm_head", "language_model.model", "language_model"),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), _inside(LLAMA, "model.language_model", "lm_head", "model")),
    "mistral3": replace(
        _inside(LLAMA, "model.language_model", "lm_head", "language_model.model", "language_model"),
        inner=("mistral", "ministral", "ministral3"),
    ),
    "qwen3_5": _inside(Layout(), "model.language_model", "lm_head"),
    "qwen3_5_moe": _inside(_QWEN3_5_MOE, "model.language_model", "lm_head"),
}

# {model_type: why it is not supported, and what that would need}.
REFUSED = {
    "nemotron_h": "its experts write into a latent space, and the projection out of it is another tensor",
    "gemma3n": "its layers add several predictions of the residual stream, not the MLP block's output",
    "granitemoeshared": "its routed and its shared expert are added to each other outside of any module",
    "qwen3_vl_moe": "its files hold the experts' matrices either way round, and nothing in them says which",
    "gemma4": "its layers add an embedding of each layer between the MLP block and the residual stream",
}

# Fields of config.json that give the number of routed experts.
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def without_number(name: str) -> str:
    """Return a tensor's name with a star for the number of its expert. Experts of a layer then have one name."""
    return re.sub(r"\[\d+\]$", "[*]", re.sub(r"(?<=\.experts\.)\d+(?=\.)", "*", name))
