"""A small character-level transformer: about 3.2 million weights, 38 MB with Adam's moments."""

import torch
from corpus import VOCABULARY
from torch import nn
from torch.nn import functional

WIDTH, HEADS, LAYERS, WINDOW, DROPOUT = 256, 4, 4, 96, 0.1


class Block(nn.Module):
    """Causal attention and a feed-forward layer, each behind a norm and a residual."""

    def __init__(self) -> None:
        """Make the four matrices."""
        super().__init__()
        self.attend_norm, self.feed_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mix_in, self.mix_out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.widen, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, window, WIDTH) to the same shape."""
        batch, window, _ = x.shape
        parts = self.mix_in(self.attend_norm(x)).view(batch, window, 3, HEADS, WIDTH // HEADS)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.dropout(self.mix_out(seen.transpose(1, 2).reshape(batch, window, WIDTH)))
        fed: torch.Tensor = self.narrow(functional.gelu(self.widen(self.feed_norm(x))))
        return x + self.dropout(fed)


class Transformer(nn.Module):
    """Predicts the next character."""

    def __init__(self) -> None:
        """Make LAYERS blocks between an embedding and a projection."""
        super().__init__()
        self.characters = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Embedding(WINDOW, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy in nats over (batch, window) characters."""
        x = self.characters(inputs) + self.places(torch.arange(inputs.shape[1]))
        logits = self.head(self.norm(self.blocks(x)))
        return functional.cross_entropy(logits.view(-1, VOCABULARY), targets.reshape(-1))
