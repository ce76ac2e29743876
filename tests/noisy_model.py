"""A model that is as hard to repeat as models get."""

import random

import numpy as np
import torch
from torch import nn


class NoisyModel(nn.Module):
    """Draws from every generator and moves buffers: one in place, one by replacing it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 1))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last_batch_mean", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.last_batch_mean = x.mean()
        noise = random.random() + np.random.rand() + torch.rand(())
        return (self.layers(x) ** 2).mean() + noise
