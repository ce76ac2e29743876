"""The published ALSALS algorithm (arXiv 2403.18519), and the default of this package, in their plainest form.

The optimizer is tested against them.
"""

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


def path_reference(f, w, lrs, start_size, c=0.3, beta3=0.5, growth_factor=1.03, decrease_factor=0.9):
    """Minimize `f(w, k)` from the flat float64 tensor `w`, with the step size that follows the slope along the path.

    `lrs` are the learning rates of all steps, `start_size` the step size of the first one; every step searches until
    the learning rate is below half of its peak.

    Returns:
        The step size of each step, the loss that each step started from, and the last `w`.
    """
    w = w.clone()
    w_0 = w.bfloat16().double()
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    eta, s, b, path, size, sizes = start_size, 0.0, 0.0, 0.0, 0.0, []
    step_sizes, losses = [], []
    for k, lr in enumerate(lrs):
        w_grad = w.clone().requires_grad_()
        loss = f(w_grad, k)
        (g,) = torch.autograd.grad(loss, w_grad)
        loss = loss.item()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        d = (m / (1 - 0.9 ** (k + 1))) / ((v / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8)

        accepted = True
        if k > 0 and lr >= 0.5 * max(lrs[: k + 1]):
            slope = (g * (w_0 - w.bfloat16().double())).sum().item()
            path, size = 0.9 * path + 0.1 * slope, 0.9 * size + 0.1 * abs(slope)
            sizes.append(abs(slope) if not sizes else sizes[-1] ** 0.9 * abs(slope) ** 0.1)
            x = path / size + 0.3
            eta *= growth_factor ** (x * min(1, 10 * sizes[-1] / max(sizes)) if x > 0 else x)
            first, a = eta, (g * d).sum().item()
            s = beta3 * s + (1 - beta3) * a
            while True:
                decrease = loss - f(w - eta * d, k).item()
                new_b = beta3 * b + (1 - beta3) * (eta * a - decrease) / eta**2
                accepted = eta * s - eta**2 * new_b >= (c if s > 0 else 1 / c) * eta * s
                if accepted or eta * decrease_factor < 0.5 * first:
                    break
                eta *= decrease_factor
            b = new_b

        if accepted or decrease > 0:
            w = w - lr * eta * d
        step_sizes.append(eta)
        losses.append(loss)
    return step_sizes, losses, w
