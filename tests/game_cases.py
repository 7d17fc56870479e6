"""Small networks with a UNet's names of layers, random data, and a game set up for one turn."""

from __future__ import annotations

from typing import Any

import torch
from gaussian_world import draws, partners_of
from torch import Tensor, nn
from torch.nn import functional

from nas.batches import WHOLE, Batch, Part, stream
from nas.diffusion import FLOW, Conditioning, FlowDenoiser, Preconditioner
from nas.objectives import Game, Scene, objective

ROWS = 4
SHAPE = (2, 8, 8)


class Net(nn.Module):
    """Convolutions under the names that a UNet's have; `told` records the captions it was given."""

    def __init__(self, width: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(SHAPE[0], width, 3, padding=1)
        self.time = nn.Linear(1, width)
        self.text = nn.Linear(3, width)
        self.down_blocks = nn.ModuleList([nn.ModuleDict({"resnets": nn.ModuleList([nn.Conv2d(width, width, 1)])})])
        self.mid_block = nn.ModuleDict({"resnets": nn.ModuleList([nn.Conv2d(width, width, 2, stride=2)])})
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Conv2d(width, SHAPE[0], 3, padding=1)
        self.told: list[Tensor] = []

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        self.told.append(text)
        told = self.time(timestep[:, None] / 1000) + self.text(text.mean(1))
        hidden = self.conv_in(sample) + told[:, :, None, None]
        down: Any = self.down_blocks[0]
        middle: Any = self.mid_block
        hidden = functional.silu(down["resnets"][0](functional.silu(hidden)))
        low = functional.silu(middle["resnets"][0](hidden))
        return self.out(self.dropout(hidden + functional.interpolate(low, scale_factor=2.0)))


class Player(FlowDenoiser):
    """A small rectified-flow denoiser that knows the shape of its images."""

    image_shape = SHAPE


def player(seed: int, *, width: int = 8, dropout: float = 0.0, learns: bool = True) -> Player:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = Player(Net(width, dropout), Preconditioner(mean=(0.0,), sd=0.5))
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.mul_(2)  # large answers, so that differences between players stand out
    return made.requires_grad_(learns).train(learns)


class Data:
    """Random images with captions; counts which steps were asked for."""

    size = ROWS

    def __init__(self, *, prompts_only: bool = False) -> None:
        self.prompts_only = prompts_only

    def batch(self, step: int, part: Part = WHOLE) -> Batch:
        generator = stream(3, step)
        clean = 0.5 * torch.randn((ROWS, *SHAPE), generator=generator)
        text = Conditioning(tokens=torch.randn((ROWS, 5, 3), generator=generator))
        null = Conditioning(tokens=torch.zeros(1, 5, 3))
        images = None if self.prompts_only else clean
        return Batch(text=text, null_text=null, clean=images).rows(part.rows(ROWS))


class Table:
    """A game set up: its players and one turn."""

    def __init__(self, name: str, settings: dict[str, Any], *, student: Any = None) -> None:
        self.game: Game = objective(name, **settings)  # type: ignore[assignment]
        self.student: Any = student or player(1, width=6)
        self.teacher: Any = player(2, learns=False)
        self.partners: dict[str, Any] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.partners = partners_of(self.game, self.student, self.teacher, Data().batch(0))
            with torch.no_grad():  # as after some training: what starts as a copy is none any more
                for module in self.partners.values():
                    for parameter in module.parameters():
                        parameter.add_(0.1 * torch.randn(parameter.shape))

    def scene(self, *, seed: int = 5, part: Part = WHOLE, batch: Batch | None = None) -> Scene:
        return Scene(
            student=self.student,
            teacher=self.teacher,
            partners=self.partners,
            batch=batch or Data().batch(0, part),
            draws=draws(ROWS, seed, part),
            schedule=FLOW,
        )

    @property
    def losing(self) -> tuple[str, ...]:
        """Whose turns there are: "" is the student's."""
        return (*self.game.turns(0), "")

    def terms(self, who: str, **scene: Any) -> dict[str, Tensor]:
        for partner in self.partners.values():  # as the loop does: only the player's own weights learn
            partner.requires_grad_(bool(who) and partner is self.partners[who])
        turn = self.scene(**scene)
        return self.game.partner_loss(who, turn) if who else self.game.student_loss(turn)

    def loss(self, who: str, **scene: Any) -> Tensor:
        return torch.stack(list(self.terms(who, **scene).values())).sum()


def gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad for p in module.parameters() if p.grad is not None]


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])
