"""The published ALSALS algorithm (arXiv 2403.18519), and the default of this package, in their plainest form.

The optimizer is tested against them.
"""

import math

import torch


def alsals_reference(
    f, w, steps, c, growth_factor, beta3=0.99, decrease_factor=0.9, eta=0.1, beta1=0.9, beta2=0.999, eps=1e-8
):
    """Minimize `f(w, k)`, the loss of step k's batch, from the flat float64 tensor `w`.

    Returns:
        The accepted step size of each step, the loss that each step started from, and the last `w`.
    """
    w = w.clone()
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    s, h = 0.0, 0.0
    step_sizes, losses = [], []
    for k in range(steps):
        w_grad = w.clone().requires_grad_()
        loss = f(w_grad, k)
        (g,) = torch.autograd.grad(loss, w_grad)
        loss = loss.item()

        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        d = (m / (1 - beta1 ** (k + 1))) / ((v / (1 - beta2 ** (k + 1))).sqrt() + eps)
        s = beta3 * s + (1 - beta3) * (g * d).sum().item()

        while True:
            new_h = beta3 * h + (1 - beta3) * (loss - f(w - eta * d, k).item())
            if new_h >= (c if s > 0 else 1 / c) * eta * s:
                break
            eta = decrease_factor * eta

        w, h = w - eta * d, new_h
        step_sizes.append(eta)
        losses.append(loss)
        eta = eta * growth_factor
    return step_sizes, losses, w


def path_reference(
    f, w, shapes, lrs, start_sizes, c=0.1, beta3=0.5, growth_factor=1.03, decrease_factor=0.9, bounded_steps=400
):
    """Minimize `f(w, k)` from the flat float64 tensor `w`, with step sizes that follow the slope along the path.

    `shapes` are those of the tensors that `w` is made of, of which matrices are hidden ones, `lrs` the learning rates
    of all steps and `start_sizes` the step sizes of the first few. Later steps search until the learning rate is
    below half of its peak.

    Returns:
        The step size of each step, the loss that each step started from, the last `w` and the multipliers of the
        tensors.
    """
    w = w.clone()
    w_0 = w.bfloat16().double()
    counts = [math.prod(shape) for shape in shapes]
    hidden = [len(shape) > 1 for shape in shapes]
    first = [part for part, is_hidden in zip(w_0.split(counts), hidden) if is_hidden]
    scales = [part.square().mean().sqrt().expand(len(part)) for part in first]
    scale = 0.45 * torch.cat(scales).log().mean().exp().float().item()  # which is a float32 number
    m, v, last_d = torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w)
    eta, taken, s, b, has_backtracked, sizes, fraction = 0.0, 0.0, 0.0, 0.0, False, [], 1.0
    logs = [0.0] * len(shapes)
    # For all hidden matrices together, and for each tensor: averages of the path slopes and of the settled ones, with
    # those of their absolute values, and the shrinking steps since both were below -0.3 of these for the first time.
    averages = [[0.0, 0.0, 0.0, 0.0, None] for _ in range(1 + len(shapes))]

    def gain(since):
        return math.log(growth_factor) * (1 if since is None else 40 / (40 + since))

    def log_growth(path, size, settled, settled_size, since):
        p, q = (mean / size if size else 0.0 for mean, size in ((path, size), (settled, settled_size)))
        before = q if len(sizes) < 40 else max(q + min(p, 0) * min(1, 4 * (1 - q)), -1)
        x = gain(since) * ((before if since is None else (p + q) / 2) + 0.3)
        return x * min(1, 10 * sizes[-1] / max(sizes)) if x > 0 else min(x + fall, 0)

    def is_far_too_small(path, size, settled, settled_size, since):
        is_clear = settled_size > 0 and settled / settled_size > 0.75 and (len(sizes) >= 40 or path / size > 0.9)
        return is_clear and since is None and not has_backtracked

    step_sizes, losses = [], []
    for k, lr in enumerate(lrs):
        w_grad = w.clone().requires_grad_()
        loss = f(w_grad, k)
        (g,) = torch.autograd.grad(loss, w_grad)
        loss = loss.item()
        path = [part.sum().item() for part in (g * (w_0 - w.bfloat16().double())).split(counts)]
        last = [part.sum().item() for part in (g * last_d).split(counts)]
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        denominator = (v / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8
        d = (0.9 * m + 0.1 * g) / (1 - 0.9 ** (k + 2)) / denominator
        last_d = m / (1 - 0.9 ** (k + 1)) / denominator

        is_following = k > 0 and lr >= 0.5 * max(lrs[: k + 1])
        is_searching = is_following and k >= len(start_sizes)
        if is_following:
            settled = [p - 3 * lr * taken * along for p, along in zip(path, last)]
            both = list(zip(path, settled))
            together = tuple(sum(one[i] for one, is_hidden in zip(both, hidden) if is_hidden) for i in (0, 1))
            for average, (p, q) in zip(averages, [together, *both]):
                average[:4] = [0.9 * old + 0.1 * new for old, new in zip(average, (p, abs(p), q, abs(q)))]
                path_r, settled_r = (mean / size if size else 0.0 for mean, size in (average[:2], average[2:4]))
                if average[4] is not None:
                    average[4] += (path_r + settled_r) / 2 < -0.3
                elif k >= 40 and path_r < -0.3 and settled_r < -0.3:
                    average[4] = 0
            p = abs(together[0])
            sizes.append(p if not sizes else sizes[-1] ** 0.9 * p**0.1)
            # What the schedule takes off in this step is not taken off twice.
            last_fraction, fraction = fraction, lr / max(lrs[: k + 1])
            fall = max(math.log(last_fraction / fraction), 0.0)
            if is_searching:
                log = log_growth(*averages[0])
                log *= 2 if log > 0 and is_far_too_small(*averages[0]) else 1
                # In the end the bound falls as 1 / sqrt(k), and what is above it too.
                before_fall, fall_now = (math.sqrt(bounded_steps / max(n, bounded_steps)) for n in (k, k + 1))
                largest = scale * fall_now
                eta = min(eta * math.exp(log), max(eta * fall_now / before_fall, largest))
            for i, average in enumerate(averages[1:]):
                if averages[0][4] is None:
                    average[4] = None  # all move alike at first
                else:
                    lead = log_growth(*average) - log_growth(*averages[0])
                    lead = max(lead - 0.3 * gain(average[4]), 0.0) if lead > 0 else lead
                    logs[i] = min(max(logs[i] + lead, 0.0), math.log(4.0 if hidden[i] else 32.0))
        multipliers = [2 ** (round(4 * log / math.log(2)) / 4) for log in logs]
        d, last_d = (
            torch.cat([multiplier * part for multiplier, part in zip(multipliers, one.split(counts))])
            for one in (d, last_d)
        )

        accepted = True
        if k < len(start_sizes):
            eta = start_sizes[k]
        if is_searching:
            start, a = eta, (g * d).sum().item()
            s = beta3 * s + (1 - beta3) * a
            while True:
                decrease = loss - f(w - eta * d, k).item()
                new_b = beta3 * b + (1 - beta3) * (eta * a - decrease) / eta**2
                accepted = eta * s - eta**2 * new_b >= (c if s > 0 else 1 / c) * eta * s
                if accepted or eta * decrease_factor < 0.5 * start:
                    break
                eta *= decrease_factor
            has_backtracked |= eta < start
            for _ in range(2 if accepted and is_far_too_small(*averages[0]) else 0):
                if 2 * eta <= largest and decrease > 0.7 * eta * a:
                    doubled = loss - f(w - 2 * eta * d, k).item()
                    if doubled > 0.7 * 2 * eta * a:
                        eta, decrease = 2 * eta, doubled
                        new_b = beta3 * b + (1 - beta3) * (eta * a - decrease) / eta**2
                    else:
                        break
            b = new_b

        if accepted or decrease > 0:
            w, taken = w - lr * eta * d, eta
        else:
            taken = 0.0
        step_sizes.append(eta)
        losses.append(loss)
    return step_sizes, losses, w, multipliers
