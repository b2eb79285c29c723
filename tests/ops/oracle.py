"""SPEC in the most literal form: numpy, float64, one sequence, one head, one token at a time.

Shares no code with the package. It is what `recurrent_carve` is measured against.
"""

import numpy as np


def sigmoid(x):
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def norm(z, content_norm):
    return z / np.sqrt(np.mean(z**2) + 1e-8) if content_norm == "rms" else z


def one_head(q, k, v, g, e, w, p_down, p_up, p_write, state, *, content, content_norm, chunk_size, scale, top):
    """One head. q, k, g, e `[T, K]`, v `[T, V]`, w `[T]`; p_down `[V, R]`, p_up `[R, K]`, p_write `[R]`.

    state: (memory `[K, V]`, content, content_sum, position); the content is `[R]` for "mean", `[K, R]` for "read".
    """
    S, c, total, position = state
    K, V = q.shape[1], v.shape[1]
    o = np.zeros((len(q), V))
    for t in range(len(q)):
        erase, write = e[t], None if w is None else w[t]
        if p_down is not None:
            z = norm(c if content == "mean" else k[t] @ c, content_norm)
            erase = erase + (0 if p_up is None else z @ p_up)
            write = write if p_write is None else write + z @ p_write
        b = top * sigmoid(erase)
        a = 1.0 if write is None else sigmoid(write)
        S = (np.eye(K) - np.outer(k[t], b * k[t])) @ np.diag(np.exp(g[t])) @ S + a * np.outer(k[t], v[t])
        o[t] = scale * S.T @ q[t]
        position += 1
        total = None if total is None else total + o[t]
        if position == chunk_size:
            position = 0
            if p_down is not None:
                c = (total / chunk_size) @ p_down if content == "mean" else S @ p_down
            total = None if total is None else np.zeros(V)
    return o, (S, c, total, position)


def oracle(
    q,
    k,
    v,
    g,
    e,
    w=None,
    p_down=None,
    p_up=None,
    p_write=None,
    *,
    content="mean",
    content_norm=None,
    chunk_size=64,
    scale=None,
    qk_l2norm=False,
    allow_neg_eigval=False,
    initial_state=None,
):
    """Arguments of `recurrent_carve` as numpy arrays; returns o and the fields of the final state."""
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    scale = K**-0.5 if scale is None else scale
    if qk_l2norm:
        q, k = (x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    R = 0 if p_down is None else p_down.shape[-1]
    o, finals = np.zeros((B, T, HV, V)), []
    for n in range(B):
        for h in range(HV):
            key_head = h // (HV // H)
            if initial_state is not None:
                state = tuple(None if x is None else x[n, h] for x in initial_state[:3])
                state = (*state, int(initial_state[3][n]))
            elif p_down is None:
                state = (np.zeros((K, V)), None, None, 0)
            elif content == "mean":
                state = (np.zeros((K, V)), np.zeros(R), np.zeros(V), 0)
            else:
                state = (np.zeros((K, V)), np.zeros((K, R)), None, 0)
            o[n, :, h], final = one_head(
                q[n, :, key_head],
                k[n, :, key_head],
                v[n, :, h],
                g[n, :, h if g.shape[2] == HV else key_head],
                e[n, :, h if e.shape[2] == HV else key_head],
                None if w is None else w[n, :, h],
                *(None if x is None else x[h] for x in (p_down, p_up, p_write)),
                state,
                content=content,
                content_norm=content_norm,
                chunk_size=chunk_size,
                scale=scale,
                top=2 if allow_neg_eigval else 1,
            )
            finals.append(final)
    stacked = [None if x[0] is None else np.stack(x).reshape(B, HV, *np.shape(x[0])) for x in zip(*finals, strict=True)]
    stacked[3] = stacked[3][:, 0]
    return o, tuple(stacked)
