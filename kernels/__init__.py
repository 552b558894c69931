"""The ops of a Pythia step, one op a file. Each file starts with the mathematics and a reference in plain torch."""

from kernels.attention import document_bounds, linear_rotary_attention, rotary_attention
from kernels.cross_entropy import linear_cross_entropy
from kernels.gelu import bias_gelu
from kernels.layernorm import add_dual_layer_norm, add_layer_norm
from kernels.linear import linear
from kernels.rotary import rotary_tables, rotate
