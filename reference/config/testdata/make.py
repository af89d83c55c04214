"""Makes transformers5.json with transformers 5 itself: python
reference/config/testdata/make.py, in the environment that `make oracles` sets
up. It is gpt-oss-20b's configuration, read in transformers 4's spelling and
saved in today's."""

import pathlib

import transformers

here = pathlib.Path(__file__).parent
config = transformers.GptOssConfig(
    num_hidden_layers=24, num_local_experts=32, swiglu_limit=7.0, rope_theta=150000,
    rope_scaling={"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
                  "rope_type": "yarn", "truncate": False})
config.to_json_file(here / "transformers5.json", use_diff=False)
