"""The reference language model."""

from lm2_kernels.model.config import LM2Config
from lm2_kernels.model.decoder import LM2ForCausalLM
from lm2_kernels.model.generation import Generated
from lm2_kernels.model.output import LM2Output
from lm2_kernels.model.released import release_state_dict

__all__ = ["Generated", "LM2Config", "LM2ForCausalLM", "LM2Output", "release_state_dict"]
