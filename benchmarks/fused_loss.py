"""Divergence fused with the LM head against materialised logits: time, peak memory, gradients.

    python benchmarks/fused_loss.py

Forward KL of 4,096 tokens with gradients of hidden states and head, at the vocabulary and width of two models. "Extra"
memory is what is used above hidden states, heads and the gradients themselves. Materialised logits of the larger
vocabulary are computed in two halves, for whole they and what follows from them need 20 GB. Exits with 1 if gradients
differ by more than ``MOST_ERROR``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from measure import alternate, peak_tensor_bytes

from selfdistill.loss.chunked import chunked_loss
from selfdistill.loss.divergence import Divergence, forward_kl

TOKENS = 4096
MOST_ERROR = 1e-4
"""Relative; sums of float32 in another order differ by some 1e-6."""


def compare(vocabulary: int, width: int, parts: int, repeats: int) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(width, vocabulary, bias=False)
    head.weight.data.normal_(std=0.04)
    teacher_head = torch.nn.Linear(width, vocabulary, bias=False).requires_grad_(False)
    teacher_head.weight.data.copy_(head.weight.data)
    student_ND = torch.randn(TOKENS, width, requires_grad=True)
    teacher_ND = student_ND.detach() + 0.3 * torch.randn(TOKENS, width)
    tokens_N = torch.randint(vocabulary, (TOKENS,))
    weights_N = torch.full((TOKENS,), 1 / TOKENS)
    student_ND.grad, head.weight.grad = torch.zeros_like(student_ND), torch.zeros_like(head.weight)

    def materialised() -> None:
        for part in torch.arange(TOKENS).chunk(parts):
            with torch.no_grad():
                teacher_NV = teacher_head(teacher_ND[part])
            (weights_N[part] * forward_kl(head(student_ND[part]), teacher_NV)).sum().backward()

    def fused() -> None:
        value, _ = chunked_loss(
            Divergence(), student_ND, head, (head.weight,), tokens_N, weights_N, (teacher_ND, teacher_head)
        )
        value.backward()

    def gradients(run: Callable[[], None]) -> tuple[torch.Tensor, torch.Tensor, int]:
        student_ND.grad.zero_()
        head.weight.grad.zero_()
        peak = peak_tensor_bytes(run)
        return student_ND.grad.clone(), head.weight.grad.clone(), peak

    whole = gradients(materialised)
    mine = gradients(fused)
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(mine[:2], whole[:2], strict=True)]
    own = head.weight.numel() * 4 + student_ND.numel() * 4  # the gradients before they are added to .grad
    logits = TOKENS * vocabulary * 4
    seconds = alternate({"fused": fused, "materialised": materialised}, repeats)
    print(
        f"V {vocabulary}, D {width}: time {seconds['fused'] / seconds['materialised']:.2f} of materialised "
        f"({seconds['fused']:.2f} s, {seconds['materialised']:.2f} s); extra memory "
        f"{(mine[2] - own) / logits:.3f} of float32 logits, materialised {(whole[2] - own) / logits:.2f}; "
        f"relative error of gradients {max(errors):.1e}"
    )
    if not all(error <= MOST_ERROR for error in errors):
        raise SystemExit(f"error: gradients differ by more than {MOST_ERROR:g}")


if __name__ == "__main__":
    compare(49_152, 576, parts=1, repeats=3)
    compare(151_936, 896, parts=2, repeats=1)
