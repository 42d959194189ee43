"""Networks that more than one test file needs."""

from torch import nn

from reappraisal.lab import models
from reappraisal.lab.models import generator


def shaken(net, seed=0):
    """Double precision, evaluation mode, generic weights and averages."""
    draws = generator(seed)
    net = net.double().eval()
    for t in (*net.parameters(), *net.buffers()):
        if t.is_floating_point():
            t.data.uniform_(0.5, 1.5, generator=draws)
            if t.ndim > 1:
                t.data.normal_(0, 0.5, generator=draws)
    return net


class Everything(nn.Module):
    """Batch norm, dropout, a skip and attention in one small network."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.mix = models.Attention(4, 2, False)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        h = self.norm(self.first(x)).relu()
        h = h + self.mix(h.view(-1, 2, 4)).flatten(1)
        return self.head(self.drop(h))
