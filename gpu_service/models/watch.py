"""A network that feels the movements of a wrist as they come, and says which exercise they are."""

import torch
from torch import nn

CHUNK = 25  # samples of a step: half a second
_AVERAGED = 5  # neighbouring samples, of which the network sees the mean: 10 a second are enough
_WINDOW = 30  # such means that a feature may look at: three seconds
_SHORT = 5  # those that the first layer looks at: half a second


class WatchGRU(nn.Module):
    """One step of a stream: half a second of movement → the exercise, given all that came before.

    `movement` [n, 25, 6]: acceleration in g along x, y, z, then rotation around them in rad/s, as a
    watch measures them 50 times a second. `left` [n] bool: it is worn on the left wrist. Then the
    state: `recent` [n, 25, 6], the last seconds before, and `hidden` [n, hidden], remembered of all
    that came before. Returns logits [n, classes] and the new state.
    """

    def __init__(
        self, *, classes: int = 7, width: int = 64, hidden: int = 64, dropout: float = 0.3
    ) -> None:
        super().__init__()
        self.scale: torch.Tensor
        self.mirror: torch.Tensor
        # Fixed numbers, not those of some data: about 1 g, and 2.5 rad/s.
        self.register_buffer("scale", torch.tensor([1.0] * 3 + [0.4] * 3))
        # x points along the arm, towards the hand on one wrist, and away from it on the other.
        # Seen in a mirror, an acceleration changes its sign along x, and a rotation around y and z.
        self.register_buffer("mirror", torch.tensor([-1.0, 1.0, 1.0, 1.0, -1.0, -1.0]))
        self.features = nn.Sequential(
            nn.Conv1d(6, width, _SHORT),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(width * (_WINDOW - _SHORT + 1), width),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(width, hidden),
            nn.ReLU(),
        )
        self.cell = nn.GRUCell(hidden, hidden)
        self.classes = nn.Sequential(nn.Dropout(dropout), nn.Linear(hidden, classes))

    def forward(
        self,
        movement: torch.Tensor,
        left: torch.Tensor,
        recent: torch.Tensor,
        hidden: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits [n, classes], and the new `recent` and `hidden`."""
        as_right = torch.where(left.view(-1, 1, 1), movement * self.mirror, movement) * self.scale
        means = as_right.view(-1, CHUNK // _AVERAGED, _AVERAGED, 6).mean(dim=2)
        window = torch.cat([recent, means], dim=1)
        hidden = self.cell(self.features(window.transpose(1, 2)), hidden)
        return self.classes(hidden), window[:, CHUNK // _AVERAGED :], hidden
