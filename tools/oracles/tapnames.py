"""The tap registry of reference/taps/taps.go, as far as the oracles need it."""

IN_BLOCK = [
    "input", "attn_normed", "q", "k", "v", "q_rot", "k_rot", "attn_core", "post_attention",
    "mlp_normed", "mlp_gate_logits", "mlp_expert_indices", "mlp_expert_weights", "mlp_dense_gate_weights",
    "mlp_prelinear_outputs", "mlp_activated_outputs", "mlp_expert_outputs", "mlp_fused", "output",
]


def block(layer, name):
    return f"block_{layer}.{name}"


def every(config):
    """All taps of a model in execution order."""
    layers = [block(layer, name) for layer in range(config["num_hidden_layers"]) for name in IN_BLOCK]
    return ["embedding", *layers, "final_norm", "logits"]


def shape(config, name, tokens):
    """The registry's shape of a tap."""
    c, inner = config, name.split(".")[-1]
    heads, kv, width = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    chosen, middle = c["experts_per_token"], c["intermediate_size"]
    special = {
        "q": [heads, width], "q_rot": [heads, width],
        "k": [kv, width], "v": [kv, width], "k_rot": [kv, width],
        "attn_core": [heads * width],
        "mlp_gate_logits": [c["num_experts"]], "mlp_dense_gate_weights": [c["num_experts"]],
        "mlp_expert_indices": [chosen], "mlp_expert_weights": [chosen],
        "mlp_prelinear_outputs": [chosen, 2 * middle],
        "mlp_activated_outputs": [chosen, middle],
        "mlp_expert_outputs": [chosen, c["hidden_size"]],
        "logits": [c["vocab_size"]],
    }
    return [tokens, *special.get(inner, [c["hidden_size"]])]


def select(config, wanted):
    """Resolves --taps: all, none (logits only), hidden, or a comma-separated list of names."""
    known = every(config)
    if wanted == "all":
        return known
    if wanted == "none":
        return ["logits"]
    if wanted == "hidden":
        inner = ("input", "post_attention", "output")
        return [n for n in known if "." not in n or n.split(".")[1] in inner]
    names = wanted.split(",")
    for name in names:
        if name not in known:
            raise SystemExit(f"--taps: no tap is called {name!r}; reference/taps/taps.go has the list")
    return [n for n in known if n in names]
