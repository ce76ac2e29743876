"""The published ALSALS algorithm (arXiv 2403.18519) in its plainest form: the optimizer is tested against it."""

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
