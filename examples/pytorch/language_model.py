# %% [markdown]
# # Experts per token in a language model of one's own
#
# A small language model of characters, in plain PyTorch: attention from `torch.nn`, and an MoE
# layer in place of each MLP. DTop-p's controller holds 2 of 16 experts per token. No Megatron, one
# device.
#
#     python examples/pytorch/language_model.py     # in the repository's root; less than a minute
#
# Editors that know cells (`# %%`) run it as a notebook.

# %%
import gzip
import json

import torch
import torch.nn.functional as F
from torch import nn

from megatron_dynmoe import Controller, Experts, MoELayer, Router

STEPS, LENGTH, BATCH = 300, 64, 16
WIDTH, HEADS, LAYERS, EXPERTS, FFN = 64, 4, 3, 16, 64
torch.manual_seed(0)

# %% [markdown]
# ## Text: a book that comes with the repository, as characters

# %%
with gzip.open("examples/data/book.jsonl.gz", "rt", encoding="utf-8") as lines:
    text = "\n".join(json.loads(line)["text"] for line in lines)
characters = sorted(set(text))
number_of = {character: number for number, character in enumerate(characters)}
tokens = torch.tensor([number_of[character] for character in text])
print(f"{len(tokens):,} characters, {len(characters)} different ones")


# %% [markdown]
# ## The model: `MoELayer(Router, Experts)` stands where an MLP would
#
# It returns the hidden states, the experts of each token, and the router's losses, which are added
# to the model's.


# %%
class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.moe_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, bias=False)
        self.moe = MoELayer(Router(WIDTH, EXPERTS), Experts(WIDTH, EXPERTS, FFN))

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        length = hidden.shape[1]
        masked = torch.ones(length, length, dtype=torch.bool).triu(1)
        normed = self.attention_norm(hidden)
        attended, _ = self.attention(normed, normed, normed, attn_mask=masked, need_weights=False)
        hidden = hidden + attended
        output = self.moe(self.moe_norm(hidden))
        return hidden + output.hidden_states, output.experts_per_token, output.loss


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(len(characters), WIDTH)
        self.position = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, len(characters), bias=False)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden = self.token(ids) + self.position.weight[: ids.shape[1]]
        counts, losses = [], []
        for block in self.blocks:
            hidden, experts, loss = block(hidden)
            counts.append(experts)
            losses.append(loss)
        return self.head(self.norm(hidden)), torch.stack(counts), torch.stack(losses).sum()


# %% [markdown]
# ## Training: one line more than usual, `controller.update(counts)`
#
# The controller has set the first threshold from the number of experts and the target. After each
# step it moves the threshold of all layers, so that the mean over tokens and layers stays.

# %%
model = Model()
controller = Controller(model, target=2.0)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
print(f"first threshold {controller.threshold.item():.3f}")
for step in range(STEPS + 1):
    starts = torch.randint(len(tokens) - LENGTH - 1, (BATCH,))
    rows = torch.stack([tokens[start : start + LENGTH + 1] for start in starts])
    logits, counts, routing_loss = model(rows[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    optimizer.zero_grad()
    (loss + routing_loss).backward()
    optimizer.step()
    controller.update(counts)
    if step % (STEPS // 10) == 0:
        by_layer = " ".join(f"{mean:.2f}" for mean in counts.double().mean(dim=(1, 2)))
        print(
            f"step {step:3}  loss {loss.item():.3f}  experts per token "
            f"{controller.measured.item():.2f} (by layer {by_layer})  "
            f"threshold {controller.threshold.item():.3f}"
        )

# %% [markdown]
# ## Which characters get more experts?
#
# Each with the mean over layers, from few experts to many.

# %%
prompt = text[1000 : 1000 + LENGTH]
with torch.no_grad():
    _, counts, _ = model(torch.tensor([[number_of[character] for character in prompt]]))
means = counts[:, 0].double().mean(dim=0).tolist()
print(" ".join(f"{character!r}:{mean:.1f}" for character, mean in zip(prompt, means, strict=True)))

# %% [markdown]
# ## Saving: the thresholds are the model's, the controller has the rest
#
# To go on, make model and controller anew, then load both; the controller sets a first threshold,
# which the model's then replaces.

# %%
saved = {"model": model.state_dict(), "controller": controller.state_dict()}
again = Model()
resumed = Controller(again, target=2.0)
again.load_state_dict(saved["model"])
resumed.load_state_dict(saved["controller"])
assert torch.equal(resumed.threshold, controller.threshold)
print(f"resumed at threshold {resumed.threshold.item():.3f}")
