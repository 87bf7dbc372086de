"""The columns of the tables that kernels read, in the order in which layout.py and launches.py write them."""

from __future__ import annotations

import triton.language as tl

from adafactor_compiled._fused import pieces
from adafactor_compiled._update import rounding
from adafactor_compiled._update.numbers import Numbers

# Of a member, where its tensors lie, and which row of the numbers is its own. A vector's second moment stands for its rows.
POINTERS = tl.constexpr(pieces.ADDRESSES)
P_AT, G_AT, ROW_AT, COL_AT, EXP_AVG_AT, RMS_AT, UPDATE_RMS_AT, NUMBERS_AT = map(tl.constexpr, range(pieces.ADDRESSES))
# Behind the sums of the squares of its parameter, as many tell how many elements agree. Its last two columns, and the addresses
# of a unit, say where the ranks that share it add up what they sum.
MEMBER = tl.constexpr(8)
NUMEL, RESULT, PARAM_SQ, PARAM_SQ_COUNT, UPDATE_SQ, UPDATE_SQ_COUNT, SUMS_AT, AGREE_AT = map(tl.constexpr, range(8))
SUMMED_UPDATE_SQ = tl.constexpr(2)  # of what lies at `SUMS_AT`; the first is the sum of the squares of the parameter
UNIT = tl.constexpr(23)
OF, START, ROW_START, COL_START, ROWS, COLUMNS, PER, BLOCKS = map(tl.constexpr, range(8))
FIRST_JOB, FIRST_COLUMN_JOB, PARTIAL, ROW_SUMS, MEAN, UNIT_PARAM_SQ, UNIT_UPDATE_SQ, SLICE = map(tl.constexpr, range(8, 16))
WHOLE_ROWS, ROW_SUM_AT, COL_SQ_AT, WEIGHTED_SQ_AT = map(tl.constexpr, range(16, 20))  # of matrices
# Where a unit is of many slices: how many lie one stride apart, and four strides each of parameter and gradient.
INNER, STRIDES_OF_P, STRIDES_OF_G = map(tl.constexpr, (1, 9, 16))
NEW_ROW, NEW_COL = map(tl.constexpr, (20, 21))  # of a piece, places in what is kept until the step is sure
UNIT_AGREE = tl.constexpr(22)
NEITHER, SPLIT_ROWS, SPLIT_COLUMNS = map(tl.constexpr, (pieces.NEITHER, pieces.ROWS, pieces.COLUMNS))
STATISTICS, COUNT = map(tl.constexpr, (pieces.STATISTICS, pieces.COUNT))
NUMBERS = tl.constexpr(len(Numbers._fields))  # and in their order
LR, BETA2, ONE_MINUS_BETA2, EPS, MIN_SCALE, SCALE_PARAMETER, CLIP = map(tl.constexpr, range(7))
BETA1, ONE_MINUS_BETA1, WEIGHT_DECAY, DECAY_BY_LR, SIGN = map(tl.constexpr, range(7, 12))
DRAWS = tl.constexpr(rounding.DRAWS)
