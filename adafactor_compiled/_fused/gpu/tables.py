"""The columns of the tables that kernels read, in the order in which layout.py and launches.py write them."""

from __future__ import annotations

import triton.language as tl

from adafactor_compiled._update import rounding
from adafactor_compiled._update.numbers import Numbers

# Of a member, where its tensors lie, and which row of the numbers is its own. A vector's second moment stands for its rows.
POINTERS = tl.constexpr(8)
P_AT, G_AT, ROW_AT, COL_AT, EXP_AVG_AT, RMS_AT, UPDATE_RMS_AT, NUMBERS_AT = map(tl.constexpr, range(8))
MEMBER = tl.constexpr(6)
NUMEL, RESULT, PARAM_SQ, PARAM_SQ_COUNT, UPDATE_SQ, UPDATE_SQ_COUNT = map(tl.constexpr, range(6))
UNIT = tl.constexpr(20)
OF, START, ROW_START, COL_START, ROWS, COLUMNS, PER, BLOCKS = map(tl.constexpr, range(8))
FIRST_JOB, FIRST_COLUMN_JOB, PARTIAL, ROW_SUMS, MEAN, UNIT_PARAM_SQ, UNIT_UPDATE_SQ, SLICE = map(tl.constexpr, range(8, 16))
# Where a unit is of many slices: how many lie one stride apart, and four strides each of parameter and gradient.
INNER, STRIDES_OF_P, STRIDES_OF_G = map(tl.constexpr, (1, 9, 16))
NUMBERS = tl.constexpr(len(Numbers._fields))  # and in their order
LR, BETA2, ONE_MINUS_BETA2, EPS, MIN_SCALE, SCALE_PARAMETER, CLIP = map(tl.constexpr, range(7))
BETA1, ONE_MINUS_BETA1, WEIGHT_DECAY, DECAY_BY_LR, SIGN = map(tl.constexpr, range(7, 12))
DRAWS = tl.constexpr(rounding.DRAWS)
