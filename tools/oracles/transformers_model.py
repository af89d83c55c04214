"""Hugging Face transformers' GptOss with eager attention, observed through hooks."""

import torch
from transformers import GptOssForCausalLM
from transformers.models.gpt_oss import modeling_gpt_oss as upstream

import tapnames
from checkpoints import Checkpoint, temporary_huggingface

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load(checkpoint: Checkpoint, precision: str):
    """from_pretrained on the directory itself, or on a temporary dense twin of an OpenAI directory
    or of one that is cut."""
    options = {"dtype": DTYPES[precision], "attn_implementation": "eager", "experts_implementation": "eager"}
    if checkpoint.is_openai or not checkpoint.whole:
        directory = temporary_huggingface(checkpoint)
        try:
            model = GptOssForCausalLM.from_pretrained(directory.name, **options)
        finally:
            directory.cleanup()
    else:
        if checkpoint.has("model.layers.0.mlp.experts.gate_up_proj_blocks"):
            from transformers import Mxfp4Config

            options["quantization_config"] = Mxfp4Config(dequantize=True)
        model = GptOssForCausalLM.from_pretrained(checkpoint.path, **options)
    return model.eval()


def run(checkpoint: Checkpoint, precision: str, tokens, wanted, inject=None):
    model = load(checkpoint, precision)
    config, taps, current = checkpoint.config, {}, {"layer": 0}
    n, chosen = len(tokens), config["experts_per_token"]

    def record(name, value):
        if name in wanted:
            value = value.detach()
            if name.endswith("indices"):
                value = value.to(torch.int32)
            taps[name] = value.reshape(tapnames.shape(config, name, n)).clone()

    def here(name, value):
        record(tapnames.block(current["layer"], name), value)

    def heads_last(value):  # [1, heads, tokens, d] -> [tokens, heads, d]
        return value[0].transpose(0, 1)

    def output_of(module, name, whole=False):
        module.register_forward_hook(lambda _module, _args, out: (record if whole else here)(name, out))

    output_of(model.model.embed_tokens, "embedding", whole=True)
    output_of(model.model.norm, "final_norm", whole=True)
    output_of(model.lm_head, "logits", whole=True)

    def enter(layer):
        def hook(_module, args):
            current["layer"] = layer
            here("input", args[0])

        return hook

    def router_out(_module, _args, out):
        logits, weights, indices = out
        here("mlp_gate_logits", logits)
        here("mlp_expert_indices", indices)
        here("mlp_expert_weights", weights)
        here("mlp_dense_gate_weights", torch.zeros_like(logits).scatter(1, indices, weights))
        current["indices"] = indices

    if inject:
        hidden = inject[1].to(DTYPES[precision])[None]
        model.model.layers[inject[0]].register_forward_pre_hook(lambda _module, args: (hidden, *args[1:]))
    for layer, block in enumerate(model.model.layers):
        block.register_forward_pre_hook(enter(layer))
        output_of(block.input_layernorm, "attn_normed")
        output_of(block.self_attn.q_proj, "q")
        output_of(block.self_attn.k_proj, "k")
        output_of(block.self_attn.v_proj, "v")
        block.self_attn.o_proj.register_forward_pre_hook(lambda _module, args: here("attn_core", args[0]))
        block.post_attention_layernorm.register_forward_pre_hook(lambda _module, args: here("post_attention", args[0]))
        output_of(block.post_attention_layernorm, "mlp_normed")
        block.mlp.router.register_forward_hook(router_out)
        _observe_experts(block.mlp.experts, here, n, chosen)
        output_of(block.mlp.experts, "mlp_fused")
        output_of(block, "output")

    # Rotated queries and keys reach the attention function and nothing else.
    attention = upstream.eager_attention_forward

    def observed_attention(module, query, key, *rest, **named):
        here("q_rot", heads_last(query))
        here("k_rot", heads_last(key))
        return attention(module, query, key, *rest, **named)

    upstream.eager_attention_forward = observed_attention
    try:
        with torch.inference_mode():
            model(torch.tensor([tokens]), use_cache=False)
    finally:
        upstream.eager_attention_forward = attention
    return taps


class _FirstProduct(torch.overrides.TorchFunctionMode):
    """Shows the left operand of the first multiplication after arm() to a function."""

    see = None

    def arm(self, see):
        self.see = see

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if self.see and function in (torch.Tensor.mul, torch.Tensor.__mul__, torch.mul):
            see, self.see = self.see, None
            see(args[0])
        return function(*args, **(kwargs or {}))


def _observe_experts(experts, here, tokens, chosen):
    """transformers runs expert by expert. _apply_gate shows the pre-activations
    and the activations of one expert's tokens, and the product with the routing
    weights that follows shows the outputs; they are sorted back into slots."""
    state, apply, mode = {}, experts._apply_gate, _FirstProduct()

    def enter(_module, args, kwargs):
        indices = kwargs.get("router_indices", args[1] if len(args) > 1 else None)
        # The experts come in ascending order, each with its (slot, token) pairs
        # in the order of torch.where on the transposed one-hot mask.
        state["places"] = []
        for expert in indices.unique():
            slot, token = torch.where((indices == expert).T)
            state["places"].append((token, slot))
        state["taps"] = {}
        mode.__enter__()

    def put(name, place, rows):
        whole = state["taps"].setdefault(name, rows.new_zeros(tokens, chosen, rows.shape[-1]))
        whole[place] = rows

    def observed(gate_up):
        place = state["places"].pop(0)
        put("mlp_prelinear_outputs", place, gate_up)
        out = apply(gate_up)
        put("mlp_activated_outputs", place, out)
        mode.arm(lambda rows: put("mlp_expert_outputs", place, rows))
        return out

    def leave(_module, _args, _out):
        mode.__exit__(None, None, None)
        if state["places"] or len(state["taps"]) != 3:
            raise SystemExit("transformers: the experts did not run one by one; see tools/oracles/transformers_model.py")
        for name, value in state["taps"].items():
            here(name, value)

    experts.register_forward_pre_hook(enter, with_kwargs=True)
    experts._apply_gate = observed
    experts.register_forward_hook(leave)
