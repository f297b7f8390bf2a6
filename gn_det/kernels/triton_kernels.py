"""The Triton kernels of fused GroupNorm. Importing this module imports Triton: only :mod:`launch` does, when it runs.

Kernels see x as (N, C, P): P pixels of each of C channels, contiguous so or, with ``LAST``, as (N, P, C). A program
holds a tile of BC channels x BP pixels, so both layouts share the code and only the offsets differ. Sizes are runtime
integers that are not specialized; compile-time values are the tile, the layout, which tensors take part, and ``VEC``:
that the contiguous dimension is a multiple of 16, without which loads cannot be vectorized. Over any image sizes a
kernel is therefore compiled at most twice for a layer. Offsets are int64. All arithmetic is fp32.

Sums are split over S slices of ``chunk`` pixels. Each program writes its own slot (n, c, s), and slots are merged in a
fixed order: no atomics, the same bits in every run.
"""

# mypy: disable-error-code="no-untyped-def", disallow-untyped-decorators=False
# No "from __future__ import annotations": Triton reads the constexpr annotations.

import triton
import triton.language as tl

#: sizes that differ between images; Triton would recompile for 1, for multiples of 16 and for others
_SIZES = ["C", "G", "P", "S", "chunk", "blocks", "N", "programs"]


@triton.jit
def _times_16(size):
    """``size``, a multiple of 16, in a form that tells so; tl.multiple_of has no effect on a kernel's argument."""
    return size // 16 * 16


@triton.jit
def _offsets(n, c, p, C, P, LAST: tl.constexpr):
    """int64 offsets of channels ``c`` (BC,) and pixels ``p`` (BP,) of sample ``n``: (BC, BP)."""
    start = n.to(tl.int64) * C * P
    if LAST:
        return start + p[None, :].to(tl.int64) * C + c[:, None]
    else:
        return start + c[:, None].to(tl.int64) * P + p[None, :]


@triton.jit
def _group_sum(v, group):
    """(BC,) to (BC,): each channel gets the sum over the channels of its group; invalid lanes must hold 0."""
    same = group[:, None] == group[None, :]
    return tl.sum(tl.where(same, v[None, :], 0.0), axis=1)


@triton.jit
def _merge(mean_ptr, m2_ptr, first, count, S, chunk, P, eps, BK: tl.constexpr):
    """Mean and 1 / std of ``count`` slots from ``first`` on, in fixed order (Chan's formula, about a first mean)."""
    total = (count // S).to(tl.float32) * P
    acc = tl.zeros([BK], tl.float32)
    for k0 in range(0, count, BK):
        k = k0 + tl.arange(0, BK)
        size = tl.where(k < count, tl.minimum(chunk, P - (k % S) * chunk), 0).to(tl.float32)
        acc += size * tl.load(mean_ptr + first + k, mask=k < count, other=0.0)
    about = tl.sum(acc, axis=0) / total
    off = tl.zeros([BK], tl.float32)
    m2 = tl.zeros([BK], tl.float32)
    for k0 in range(0, count, BK):
        k = k0 + tl.arange(0, BK)
        size = tl.where(k < count, tl.minimum(chunk, P - (k % S) * chunk), 0).to(tl.float32)
        d = tl.where(k < count, tl.load(mean_ptr + first + k, mask=k < count, other=0.0) - about, 0.0)
        off += size * d
        m2 += tl.load(m2_ptr + first + k, mask=k < count, other=0.0) + size * d * d
    shift = tl.sum(off, axis=0) / total
    var = tl.sum(m2, axis=0) / total - shift * shift
    return about + shift, 1.0 / tl.sqrt(tl.where(var < 0.0, 0.0, var) + eps)


@triton.jit(do_not_specialize=_SIZES)
def stats_kernel(
    x_ptr, mean_ptr, m2_ptr, C, P, S, chunk, blocks,
    LAST: tl.constexpr, VEC: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Grid (N * blocks, S): mean and sum of squared distances from it of each channel's slice, to slot (n, c, s)."""
    n = tl.program_id(0) // blocks
    s = tl.program_id(1)
    chunk = _times_16(chunk)
    if VEC:
        if LAST:
            C = _times_16(C)
        else:
            P = _times_16(P)
    c = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    end = tl.minimum(s * chunk + chunk, P)
    # Welford's update in every lane; all lanes have seen k tiles, but for the last one.
    mean = tl.zeros([BC, BP], tl.float32)
    m2 = tl.zeros([BC, BP], tl.float32)
    count = tl.zeros([BP], tl.float32)
    k = 0.0
    for p0 in range(s * chunk, end, BP):
        p = p0 + tl.arange(0, BP)
        ok = (c < C)[:, None] & (p < end)[None, :]
        x = tl.load(x_ptr + _offsets(n, c, p, C, P, LAST), mask=ok, other=0.0).to(tl.float32)
        k += 1.0
        d = tl.where(ok, x - mean, 0.0)
        mean += d * (1.0 / k)
        m2 += d * tl.where(ok, x - mean, 0.0)
        count += (p < end).to(tl.float32)
    total = (end - s * chunk).to(tl.float32)
    about = tl.sum(mean * count[None, :], axis=1) / total
    about += tl.sum((mean - about[:, None]) * count[None, :], axis=1) / total
    d = mean - about[:, None]
    slot = (n.to(tl.int64) * C + c) * S + s
    tl.store(mean_ptr + slot, about, mask=c < C)
    tl.store(m2_ptr + slot, tl.sum(m2 + d * d * count[None, :], axis=1), mask=c < C)


@triton.jit(do_not_specialize=_SIZES)
def merge_kernel(slot_mean_ptr, slot_m2_ptr, mean_ptr, rstd_ptr, C, G, P, S, chunk, eps, BK: tl.constexpr):
    """Grid (N * G,): mean and 1 / std of each group from its slots."""
    pid = tl.program_id(0)
    count = (C // G) * S
    first = pid.to(tl.int64) * count
    mean, rstd = _merge(slot_mean_ptr, slot_m2_ptr, first, count, S, chunk, P, eps, BK)
    tl.store(mean_ptr + pid, mean)
    tl.store(rstd_ptr + pid, rstd)


@triton.jit(do_not_specialize=_SIZES)
def apply_kernel(
    x_ptr, res_ptr, w_ptr, b_ptr, y_ptr, slot_mean_ptr, slot_m2_ptr, mean_ptr, rstd_ptr,
    C, G, P, S, chunk, blocks, eps,
    MERGE: tl.constexpr, RES: tl.constexpr, RELU: tl.constexpr,
    LAST: tl.constexpr, VEC: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid (N * blocks, S): y = relu(x_hat * gamma + beta + residual).

    With ``MERGE`` (BC is 1) each program merges its group's slots itself, which saves a launch, and the first program
    of a group stores mean and 1 / std; otherwise they are read.
    """
    n = tl.program_id(0) // blocks
    s = tl.program_id(1)
    chunk = _times_16(chunk)
    if VEC:
        if LAST:
            C = _times_16(C)
        else:
            P = _times_16(P)
    D = C // G
    block = tl.program_id(0) % blocks
    c = block * BC + tl.arange(0, BC)
    end = tl.minimum(s * chunk + chunk, P)
    if MERGE:
        at = n * G + block // D
        group_mean, group_rstd = _merge(
            slot_mean_ptr, slot_m2_ptr, at.to(tl.int64) * D * S, D * S, S, chunk, P, eps, BK
        )
        if (s == 0) & (block % D == 0):
            tl.store(mean_ptr + at, group_mean)
            tl.store(rstd_ptr + at, group_rstd)
        mean = tl.zeros([BC], tl.float32) + group_mean
        rstd = tl.zeros([BC], tl.float32) + group_rstd
    else:
        mean = tl.load(mean_ptr + n * G + c // D, mask=c < C, other=0.0)
        rstd = tl.load(rstd_ptr + n * G + c // D, mask=c < C, other=0.0)
    w = tl.load(w_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    for p0 in range(s * chunk, end, BP):
        p = p0 + tl.arange(0, BP)
        ok = (c < C)[:, None] & (p < end)[None, :]
        at_x = _offsets(n, c, p, C, P, LAST)
        x = tl.load(x_ptr + at_x, mask=ok, other=0.0).to(tl.float32)
        y = (x - mean[:, None]) * rstd[:, None] * w[:, None] + b[:, None]
        if RES:
            y += tl.load(res_ptr + at_x, mask=ok, other=0.0).to(tl.float32)
        if RELU:
            y = tl.where(y < 0.0, 0.0, y)  # nan stays nan
        tl.store(y_ptr + at_x, y.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _masked(dy, x_hat, w, b, out_ptr, at, ok, MASK: tl.constexpr):
    """dy where ReLU let the value through. MASK 0: no ReLU; 1: the value is computed again; 2: read from the output."""
    if MASK == 1:
        dy = tl.where(x_hat * w[:, None] + b[:, None] <= 0.0, 0.0, dy)
    if MASK == 2:
        dy = tl.where(tl.load(out_ptr + at, mask=ok, other=0.0).to(tl.float32) <= 0.0, 0.0, dy)
    return dy


@triton.jit(do_not_specialize=_SIZES)
def backward_sums_kernel(
    dy_ptr, x_ptr, out_ptr, w_ptr, b_ptr, mean_ptr, rstd_ptr, dres_ptr, sum_ptr, sum_x_ptr,
    C, G, P, S, chunk, blocks,
    MASK: tl.constexpr, DRES: tl.constexpr,
    LAST: tl.constexpr, VEC: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Grid (N * blocks, S): sums of g and of g * x_hat over each channel's slice, to slot (n, c, s).

    g is the gradient behind the ReLU; with ``DRES`` it is stored, being the gradient of the residual.
    """
    n = tl.program_id(0) // blocks
    s = tl.program_id(1)
    chunk = _times_16(chunk)
    if VEC:
        if LAST:
            C = _times_16(C)
        else:
            P = _times_16(P)
    c = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    end = tl.minimum(s * chunk + chunk, P)
    group = n * G + c // (C // G)
    mean = tl.load(mean_ptr + group, mask=c < C, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=c < C, other=0.0)
    w = tl.load(w_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    sums = tl.zeros([BC, BP], tl.float32)
    sums_x = tl.zeros([BC, BP], tl.float32)
    for p0 in range(s * chunk, end, BP):
        p = p0 + tl.arange(0, BP)
        ok = (c < C)[:, None] & (p < end)[None, :]
        at = _offsets(n, c, p, C, P, LAST)
        x_hat = (tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32) - mean[:, None]) * rstd[:, None]
        dy = tl.load(dy_ptr + at, mask=ok, other=0.0).to(tl.float32)
        g = _masked(dy, x_hat, w, b, out_ptr, at, ok, MASK)
        if DRES:
            tl.store(dres_ptr + at, g.to(dres_ptr.dtype.element_ty), mask=ok)
        sums += g
        sums_x += tl.where(ok, g * x_hat, 0.0)
    slot = (n.to(tl.int64) * C + c) * S + s
    tl.store(sum_ptr + slot, tl.sum(sums, axis=1), mask=c < C)
    tl.store(sum_x_ptr + slot, tl.sum(sums_x, axis=1), mask=c < C)


@triton.jit(do_not_specialize=_SIZES)
def backward_merge_kernel(
    sum_ptr, sum_x_ptr, w_ptr, coefficient_ptr, dw_ptr, db_ptr, N, C, G, P, S, programs,
    BK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Grid (programs + blocks of BC channels): what the slots add up to, in fixed order.

    The first ``programs`` (N * G or 0) give the two means of a group that dx needs; the others dgamma and dbeta.
    """
    pid = tl.program_id(0)
    if pid < programs:
        D = C // G
        acc = tl.zeros([BK], tl.float32)
        acc_x = tl.zeros([BK], tl.float32)
        for k0 in range(0, D * S, BK):
            k = k0 + tl.arange(0, BK)
            w = tl.load(w_ptr + (pid % G) * D + k // S, mask=k < D * S, other=0.0).to(tl.float32)
            slot = pid.to(tl.int64) * D * S + k
            acc += w * tl.load(sum_ptr + slot, mask=k < D * S, other=0.0)
            acc_x += w * tl.load(sum_x_ptr + slot, mask=k < D * S, other=0.0)
        total = D.to(tl.float32) * P
        tl.store(coefficient_ptr + 2 * pid, tl.sum(acc, axis=0) / total)
        tl.store(coefficient_ptr + 2 * pid + 1, tl.sum(acc_x, axis=0) / total)
    else:
        c = (pid - programs) * BC + tl.arange(0, BC)
        sums = tl.zeros([BC, BK], tl.float32)
        sums_x = tl.zeros([BC, BK], tl.float32)
        for k0 in range(0, N * S, BK):
            k = k0 + tl.arange(0, BK)
            ok = (c < C)[:, None] & (k < N * S)[None, :]
            slot = ((k // S).to(tl.int64)[None, :] * C + c[:, None]) * S + (k % S)[None, :]
            sums += tl.load(sum_ptr + slot, mask=ok, other=0.0)
            sums_x += tl.load(sum_x_ptr + slot, mask=ok, other=0.0)
        tl.store(db_ptr + c, tl.sum(sums, axis=1).to(db_ptr.dtype.element_ty), mask=c < C)
        tl.store(dw_ptr + c, tl.sum(sums_x, axis=1).to(dw_ptr.dtype.element_ty), mask=c < C)


@triton.jit(do_not_specialize=_SIZES)
def backward_dx_kernel(
    dy_ptr, x_ptr, out_ptr, w_ptr, b_ptr, mean_ptr, rstd_ptr, coefficient_ptr, dx_ptr,
    C, G, P, S, chunk, blocks,
    MASK: tl.constexpr, LAST: tl.constexpr, VEC: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Grid (N * blocks, S): dx = rstd * (gamma * g - mean(gamma * g) - x_hat * mean(gamma * g * x_hat))."""
    n = tl.program_id(0) // blocks
    s = tl.program_id(1)
    chunk = _times_16(chunk)
    if VEC:
        if LAST:
            C = _times_16(C)
        else:
            P = _times_16(P)
    c = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    end = tl.minimum(s * chunk + chunk, P)
    group = n * G + c // (C // G)
    mean = tl.load(mean_ptr + group, mask=c < C, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=c < C, other=0.0)
    c1 = tl.load(coefficient_ptr + 2 * group, mask=c < C, other=0.0)
    c2 = tl.load(coefficient_ptr + 2 * group + 1, mask=c < C, other=0.0)
    w = tl.load(w_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    for p0 in range(s * chunk, end, BP):
        p = p0 + tl.arange(0, BP)
        ok = (c < C)[:, None] & (p < end)[None, :]
        at = _offsets(n, c, p, C, P, LAST)
        x_hat = (tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32) - mean[:, None]) * rstd[:, None]
        dy = tl.load(dy_ptr + at, mask=ok, other=0.0).to(tl.float32)
        g = _masked(dy, x_hat, w, b, out_ptr, at, ok, MASK)
        dx = rstd[:, None] * (w[:, None] * g - c1[:, None] - x_hat * c2[:, None])
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=_SIZES)
def small_forward_kernel(
    x_ptr, res_ptr, w_ptr, b_ptr, y_ptr, mean_ptr, rstd_ptr, C, G, P, blocks, eps,
    RES: tl.constexpr, RELU: tl.constexpr,
    LAST: tl.constexpr, VEC: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Grid (N * blocks,): whole groups in one tile (BP >= P, channels per group <= BC), x read once."""
    n = tl.program_id(0) // blocks
    D = C // G
    lane = tl.arange(0, BC)
    group = lane // D
    first = (tl.program_id(0) % blocks) * (BC // D)
    if VEC:  # channels_last, and the groups fill the tile: whole vectors of channels
        C = _times_16(C)
        c = (tl.program_id(0) % blocks) * BC + lane
        has = c < C
    else:
        c = first * D + lane
        has = (group < BC // D) & (c < C)
    p = tl.arange(0, BP)
    ok = has[:, None] & (p < P)[None, :]
    at = _offsets(n, c, p, C, P, LAST)
    x = tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32)
    total = D.to(tl.float32) * P
    mean = _group_sum(tl.sum(x, axis=1), group) / total
    mean += _group_sum(tl.sum(tl.where(ok, x - mean[:, None], 0.0), axis=1), group) / total
    d = tl.where(ok, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(_group_sum(tl.sum(d * d, axis=1), group) / total + eps)
    w = tl.load(w_ptr + c, mask=has, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + c, mask=has, other=0.0).to(tl.float32)
    y = (x - mean[:, None]) * rstd[:, None] * w[:, None] + b[:, None]
    if RES:
        y += tl.load(res_ptr + at, mask=ok, other=0.0).to(tl.float32)
    if RELU:
        y = tl.where(y < 0.0, 0.0, y)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=ok)
    writes = has & (lane % D == 0)
    tl.store(mean_ptr + n * G + first + group, mean, mask=writes)
    tl.store(rstd_ptr + n * G + first + group, rstd, mask=writes)


@triton.jit(do_not_specialize=_SIZES)
def small_backward_kernel(
    dy_ptr, x_ptr, out_ptr, w_ptr, b_ptr, mean_ptr, rstd_ptr, dx_ptr, dres_ptr, sum_ptr, sum_x_ptr,
    C, G, P, blocks,
    MASK: tl.constexpr, DRES: tl.constexpr, SUMS: tl.constexpr,
    LAST: tl.constexpr, VEC: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Grid (N * blocks,): dx, the residual's gradient and the slots (n, c) of dgamma and dbeta; x and dy read once."""
    n = tl.program_id(0) // blocks
    D = C // G
    lane = tl.arange(0, BC)
    group = lane // D
    first = (tl.program_id(0) % blocks) * (BC // D)
    if VEC:  # channels_last, and the groups fill the tile: whole vectors of channels
        C = _times_16(C)
        c = (tl.program_id(0) % blocks) * BC + lane
        has = c < C
    else:
        c = first * D + lane
        has = (group < BC // D) & (c < C)
    p = tl.arange(0, BP)
    ok = has[:, None] & (p < P)[None, :]
    at = _offsets(n, c, p, C, P, LAST)
    mean = tl.load(mean_ptr + n * G + first + group, mask=has, other=0.0)
    rstd = tl.load(rstd_ptr + n * G + first + group, mask=has, other=0.0)
    w = tl.load(w_ptr + c, mask=has, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + c, mask=has, other=0.0).to(tl.float32)
    x_hat = (tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32) - mean[:, None]) * rstd[:, None]
    dy = tl.load(dy_ptr + at, mask=ok, other=0.0).to(tl.float32)
    g = _masked(dy, x_hat, w, b, out_ptr, at, ok, MASK)
    if DRES:
        tl.store(dres_ptr + at, g.to(dres_ptr.dtype.element_ty), mask=ok)
    sums = tl.sum(g, axis=1)
    sums_x = tl.sum(tl.where(ok, g * x_hat, 0.0), axis=1)
    if SUMS:
        tl.store(sum_ptr + n.to(tl.int64) * C + c, sums, mask=has)
        tl.store(sum_x_ptr + n.to(tl.int64) * C + c, sums_x, mask=has)
    total = D.to(tl.float32) * P
    c1 = _group_sum(w * sums, group) / total
    c2 = _group_sum(w * sums_x, group) / total
    dx = rstd[:, None] * (w[:, None] * g - c1[:, None] - x_hat * c2[:, None])
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=ok)
