"""Every shape of recipe that mergekit's examples, README and pages show: keys and structure, with values of our own.

`SHAPES` and `MIXTURES` run as they stand. `MENDED` are those that do not, each with what the error says and the recipe
that it leads to. Models are stand-ins of four layers: ``base``, ``base2``, ``b``, ``c``; ``a``, which has tokens of its
own; ``gpt``; and an adapter, ``lora``.
"""

LINEAR = """
models:
  - {model: base2, parameters: {weight: 1.0}}
  - {model: b, parameters: {weight: 0.3}}
  - {model: c, parameters: {weight: 0.5}}
merge_method: linear
dtype: float16
"""
GRADIENT_SLERP = """
slices:
  - sources:
      - {model: b, layer_range: [0, 4]}
      - {model: c, layer_range: [0, 4]}
merge_method: slerp
base_model: b
parameters:
  t:
    - {filter: self_attn, value: [0, 0.4, 0.6, 1]}
    - {filter: mlp, value: [1, 0.6, 0.4, 0]}
    - value: 0.5
dtype: float16
"""
TIES = """
models:
  - {model: b, parameters: {density: [1, 0.6, 0.2], weight: 1.0}}
  - {model: c, parameters: {density: 0.4, weight: [0, 0.4, 0.8]}}
  - model: base
    parameters:
      density: 0.3
      weight: [{filter: mlp, value: 0.4}, {value: 0}]
merge_method: ties
base_model: base2
parameters: {normalize: true, int8_mask: true}
dtype: float16
"""
TWO = "models: [{model: b}, {model: c}]\n"
WEIGHED = "models: [{model: b, parameters: {weight: 0.6}}, {model: c, parameters: {weight: 0.4}}]\n"
SPARSE = """
base_model: base
models:
  - {model: b, parameters: {weight: 0.6, density: 0.5}}
  - {model: c, parameters: {weight: 0.4, density: 0.6}}
"""

SHAPES: dict[str, str] = {
    # examples/
    "examples/linear": LINEAR,
    "examples/gradient-slerp": GRADIENT_SLERP,
    "examples/ties": TIES,
    "examples/bio-merge: ties that is not normalised": SPARSE
    + "merge_method: ties\nparameters: {normalize: false, int8_mask: true}\ndtype: float16\n",
    "examples/orcamini-platy-44layer: layers of two models": """
slices:
  - sources: [{model: b, layer_range: [0, 3]}]
  - sources: [{model: c, layer_range: [2, 4]}]
merge_method: passthrough
dtype: float16
""",
    "examples/gpt2-small: the first layers of one model": """
slices:
  - sources: [{model: gpt, layer_range: [0, 2]}]
merge_method: passthrough
dtype: float16
""",
    "examples/mega: a slerp, and ties over it": f"{GRADIENT_SLERP}name: first\n---"
    + TIES.replace("model: b,", "model: first,")
    + "name: second\n",
    # README.md
    "README: settings on four levels": """
merge_method: linear
slices:
  - sources:
      - {model: b, layer_range: [0, 2], parameters: {weight: 0.9}}
      - {model: c, layer_range: [0, 2]}
    parameters: {weight: 0.2}
  - sources: [{model: b, layer_range: [2, 4]}, {model: c, layer_range: [2, 4]}]
parameters: {weight: [1e-3, 5e-1]}
""",
    "README: dtype and out_dtype": WEIGHED + "merge_method: linear\ndtype: float32\nout_dtype: bfloat16\n",
    "README: a tokenizer with rows of tokens": """
merge_method: linear
models: [{model: a, parameters: {weight: 0.5}}, {model: b, parameters: {weight: 0.5}}]
tokenizer:
  source: union
  tokens:
    <|user|>: {source: a}
    <|bot|>: {source: a, force: true}
    <|new|>: {source: {kind: model_token, model: a, token: <|user|>}}
    <|other|>: {source: {kind: model_token, model: b, token_id: 5}}
    <|unused|>: {source: {kind: zero}}
  pad_to_multiple_of: 8
""",
    "README: a tokenizer of two chat formats": """
merge_method: ties
base_model: base
models:
  - {model: a, parameters: {weight: 0.5, density: 0.5}}
  - {model: b, parameters: {weight: 0.5, density: 0.5}}
tokenizer:
  source: union
  tokens:
    <|user|>: {source: a}
    <|bot|>: {source: a, force: true}
""",
    "README: tokenizer_source base": SPARSE.replace("model: b,", "model: a,")
    + "merge_method: dare_ties\ntokenizer_source: base\n",
    "README: tokenizer_source of a model": "models: [{model: a}, {model: b}]\nmerge_method: linear\n"
    "parameters: {weight: 1}\ntokenizer_source: a\n",
    "README of 2023: tokenizer_source model:": "models: [{model: a}, {model: b}]\nmerge_method: linear\n"
    "parameters: {weight: 1}\ntokenizer_source: model:a\n",
    "README: chat_template auto": WEIGHED + "merge_method: linear\nchat_template: auto\n",
    "README: chat_template by name": WEIGHED + "merge_method: linear\nchat_template: chatml\n",
    "README: chat_template in Jinja": WEIGHED
    + "merge_method: linear\nchat_template: '{% for m in messages %}{{ m.content }}{% endfor %}'\n",
    "a LoRA on a model, as text": "models: [{model: b+lora}, {model: c}]\nmerge_method: linear\n"
    "parameters: {weight: 0.5}\n",
    "a LoRA on a model, as a mapping": """
models: [{model: {model: {path: b}, lora: {path: lora}}}, {model: c}]
merge_method: linear
parameters: {weight: 0.5}
""",
    "override_architecture": """
models: [{model: {model: b, override_architecture: LlamaForCausalLM}}, {model: c}]
merge_method: linear
parameters: {weight: 0.5}
""",
    # docs/merge_methods.md: each method with all the parameters that the page has
    "linear": WEIGHED + "merge_method: linear\nparameters: {normalize: false}\n",
    "slerp": "models: [{model: b}, {model: c}]\nbase_model: b\nmerge_method: slerp\nparameters: {t: 0.4}\n",
    "nuslerp": WEIGHED + "merge_method: nuslerp\nparameters: {nuslerp_flatten: false, nuslerp_row_wise: true}\n",
    "nuslerp of task vectors": WEIGHED + "base_model: base\nmerge_method: nuslerp\n",
    "multislerp": WEIGHED + "merge_method: multislerp\nparameters: {normalize_weights: true, eps: 1e-8}\n",
    "karcher": TWO + "merge_method: karcher\nparameters: {max_iter: 5, tol: 1e-5}\n",
    "task_arithmetic": WEIGHED + "base_model: base\nmerge_method: task_arithmetic\nparameters: {lambda: 0.8}\n",
    "dare_linear": SPARSE + "merge_method: dare_linear\nparameters: {lambda: 0.9, rescale: true}\n",
    "dare_ties": SPARSE + "merge_method: dare_ties\nparameters: {lambda: 0.9}\n",
    "della": SPARSE.replace("weight: 0.6", "weight: 0.6, epsilon: 0.1") + "merge_method: della\n"
    "parameters: {epsilon: 0.05, lambda: 1.0}\n",
    "della_linear": SPARSE + "merge_method: della_linear\nparameters: {epsilon: 0.05}\n",
    "breadcrumbs": SPARSE + "merge_method: breadcrumbs\nparameters: {gamma: 0.01}\n",
    "breadcrumbs_ties": SPARSE + "merge_method: breadcrumbs_ties\nparameters: {gamma: 0.01, lambda: 0.9}\n",
    "sce": TWO + "base_model: base\nmerge_method: sce\nparameters: {select_topk: 0.6}\n",
    "model_stock": TWO + "base_model: base\nmerge_method: model_stock\nparameters: {filter_wise: true}\n",
    "nearswap": "models: [{model: b}, {model: c}]\nbase_model: b\nmerge_method: nearswap\nparameters: {t: 0.001}\n",
    "arcee_fusion": "models: [{model: b}, {model: c}]\nbase_model: b\nmerge_method: arcee_fusion\ndtype: bfloat16\n",
    "passthrough": """
merge_method: passthrough
slices:
  - sources:
      - model: b
        layer_range: [0, 4]
        parameters: {scale: [{filter: o_proj, value: 0.0}, {filter: down_proj, value: 0.5}, {value: 1.0}]}
""",
    # docs/multimerge.md
    "multimerge: an unnamed result": """
name: first
merge_method: linear
models: [{model: b}, {model: c}]
parameters: {weight: 0.5}
---
name: second
merge_method: slerp
base_model: first
models: [{model: c}]
parameters: {t: 0.4}
---
merge_method: dare_ties
base_model: base
models:
  - {model: second, parameters: {density: 0.6, weight: 0.5}}
  - {model: b, parameters: {density: 0.8, weight: 0.5}}
""",
    "multimerge: all of them named": f"name: first\nmerge_method: linear\n{WEIGHED}---\nname: second\n"
    "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: first, parameters: {weight: 0.5}}]\n",
}

CLOWN_CAR = """
base_model: b
gate_mode: hidden
dtype: bfloat16
experts:
  - {source_model: b, positive_prompts: ["hello, who", "help with"]}
  - {source_model: c, positive_prompts: ["as a doctor"], negative_prompts: ["a poem"]}
  - {source_model: base, positive_prompts: ["[genre: fiction]"]}
"""

MIXTURES: dict[str, str] = {
    "moe.md: sparse upcycling": "base_model: b\ngate_mode: random\ndtype: bfloat16\nexperts:\n"
    + 8 * "  - source_model: b\n",
    "moe.md: hidden, with negative prompts": CLOWN_CAR,
    "moe.md: cheap_embed and experts_per_token": CLOWN_CAR.replace("hidden", "cheap_embed") + "experts_per_token: 3\n",
    "moe.md: a shared expert of Qwen MoE": CLOWN_CAR
    + "architecture: qwen\nshared_experts:\n  - {source_model: b, positive_prompts: [blah], residual_scale: 0.1}\n",
    "moe.md: a shared expert of DeepSeek MoE": CLOWN_CAR
    + "architecture: deepseek\nshared_experts:\n  - {source_model: b, residual_scale: 0.1}\n",
}

RAW = """
merge_method: ties
base_model: one.pt
models:
  - {model: two.pt, parameters: {weight: 0.5, density: 0.5}}
  - {model: three.safetensors, parameters: {weight: 0.5, density: 0.5}}
"""

MENDED: dict[str, tuple[str, str, str]] = {
    "examples of 2023: pattern for filter": (
        GRADIENT_SLERP.replace("filter: self_attn", "pattern: self_attn"),
        "10: unknown key 'pattern'; did you mean 'filter'?",
        GRADIENT_SLERP,
    ),
    "examples of 2023: out_path": (
        f"{GRADIENT_SLERP}out_path: ./first\n",
        "14: unknown key 'out_path'; where a result goes is an argument; what another document takes has a 'name'",
        GRADIENT_SLERP,
    ),
    "README: input_model_parameters": (
        f"{TWO}merge_method: linear\ninput_model_parameters: {{b: {{weight: 1}}}}\n",
        "3: unknown key 'input_model_parameters'; settings of a model are the 'parameters' beside it",
        f"{WEIGHED}merge_method: linear\n",
    ),
    "a LoRA beside a model": (
        "models: [{model: b, lora: lora}, {model: c}]\nmerge_method: linear\nparameters: {weight: 0.5}\n",
        "1: unknown key 'lora'; an adapter stands in the model: '{model: {model: …, lora: …}}'",
        "models: [{model: {model: b, lora: lora}}, {model: c}]\nmerge_method: linear\nparameters: {weight: 0.5}\n",
    ),
    "evolve.md: a genome": (
        "genome: {models: [b, c], merge_method: linear, layer_granularity: 2}\ntasks: [{name: arc}]\n",
        "1: unknown key 'genome'; a genome is searched: mergemill evolve FILE OUT (and 1 more)",
        "",
    ),
    "bakllama": (
        "layer_slices: [{model: b, start: 0, end: 2}]\nembedding_source: b\nlm_head_source: b\n",
        "1: unknown key 'layer_slices'; mergemill recipe bakllama FILE prints a recipe of it (and 2 more)",
        "",
    ),
    "create_a_merge_method.md: a method of one's own": (
        f"{WEIGHED}merge_method: simple_average\n",
        "2: unknown merge_method 'simple_average'",
        f"{WEIGHED}merge_method: simple_average\nmethods: averages.py\n",
    ),
}
