"""Self-Distillation Fine-Tuning (SDFT, arXiv 2601.19897) in one file of plain PyTorch and transformers.

    python examples/sdft_from_scratch.py MODEL ROWS.jsonl --steps 20 --output_dir taught

MODEL is a folder or a hub id of a causal language model with a chat template. ROWS.jsonl has one JSON object a line,
with the texts ``prompt`` and ``completion``. A CPU is enough for a small model; a GPU is used where there is one.

One step, for a few rows (x, c) of prompt and demonstration:

    1. The student sees x and samples a completion y.
    2. The teacher sees c as earlier turns of the chat, then x, and scores the same tokens y.
    3. The loss is KL(teacher||student) over the whole vocabulary, at each token of y.
    4. AdamW updates the student. The teacher's weights are a moving average of the student's.

Left out on purpose, to keep the method in sight: batched sampling, logits in chunks (here all of them are in memory at
once), lower precision, learning rate schedules, LoRA, several devices, other divergences and contexts, evaluation and
checkpoints. The package ``selfdistill`` has them, and ``tests/test_examples.py`` holds the two to the same gradient.

Tensor names end in their dimensions: B completions, L padded tokens of prompt and completion, T padded completion
tokens, V vocabulary. ``p`` is the student's distribution, ``q`` the teacher's.
"""

import argparse
import copy
import json
import random

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def prompt_ids(tokenizer, prompt, demonstration=None, repeats=2):
    """The student's prompt; with a demonstration the teacher's, which sees it ``repeats`` times as earlier turns."""
    question = {"role": "user", "content": prompt}
    answer = {"role": "assistant", "content": demonstration}
    earlier = [] if demonstration is None else [question, answer] * repeats
    return tokenizer.apply_chat_template([*earlier, question], add_generation_prompt=True, return_dict=False)


@torch.no_grad()
def sample(model, prompt, end_ids, max_tokens):
    """One completion at temperature 1, with its end token if one comes."""
    completion, cache, new_ids = [], None, prompt
    while len(completion) < max_tokens and not end_ids.intersection(completion):
        output = model(input_ids=torch.tensor([new_ids], device=model.device), past_key_values=cache, use_cache=True)
        probabilities_V = output.logits[0, -1].softmax(-1)
        new_ids, cache = [int(torch.multinomial(probabilities_V, 1))], output.past_key_values
        completion += new_ids
    return completion


def log_probs(model, prompts, completions):
    """Log-probabilities of every next token at every place of the completions, (B, T, V)."""
    T = max(map(len, completions))
    L = max(map(len, prompts)) + T
    # Padding stands on the right, where causal attention never looks, so any id will do.
    rows = [(prompt + completion + [0] * L)[:L] for prompt, completion in zip(prompts, completions, strict=True)]
    logits_BLV = model(input_ids=torch.tensor(rows, device=model.device), use_cache=False).logits
    # The logits at one token predict the next, so those for a completion begin at the last token of its prompt.
    starts = [len(prompt) - 1 for prompt in prompts]
    logits_BTV = torch.stack([logits_LV[i : i + T] for i, logits_LV in zip(starts, logits_BLV, strict=True)])
    return logits_BTV.log_softmax(-1)


def sdft_loss(student, teacher, student_prompts, teacher_prompts, completions):
    """KL(teacher||student), a mean over the tokens of each completion and then over the completions."""
    logp_BTV = log_probs(student, student_prompts, completions)
    with torch.no_grad():
        logq_BTV = log_probs(teacher, teacher_prompts, completions)
    kl_BT = (logq_BTV.exp() * (logq_BTV - logp_BTV)).sum(-1)
    length_B = torch.tensor([len(completion) for completion in completions], device=kl_BT.device)
    mask_BT = torch.arange(kl_BT.shape[1], device=kl_BT.device) < length_B[:, None]
    return ((kl_BT * mask_BT).sum(1) / length_B).mean()


@torch.no_grad()
def follow(teacher, student, rate):
    """Move the teacher's weights a little towards the student's; in bfloat16 most such moves would round to nothing."""
    for teachers, students in zip(teacher.parameters(), student.parameters(), strict=True):
        teachers.lerp_(students, rate)


def main():
    parser = argparse.ArgumentParser(description="Self-distillation fine-tuning in one file.")
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("rows", help=".jsonl file with prompt and completion")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    parser.add_argument("--ema_rate", type=float, default=0.01)
    parser.add_argument("--max_completion_length", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", help="where the trained model goes")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    order = random.Random(args.seed)
    with open(args.rows, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    student = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    student.to("cuda" if torch.cuda.is_available() else "cpu").eval()  # eval: no dropout
    teacher = copy.deepcopy(student).requires_grad_(False)
    ends = student.generation_config.eos_token_id
    end_ids = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate, weight_decay=0.0)

    for step in range(1, args.steps + 1):
        batch = order.sample(rows, min(args.batch_size, len(rows)))
        student_prompts = [prompt_ids(tokenizer, row["prompt"]) for row in batch]
        teacher_prompts = [prompt_ids(tokenizer, row["prompt"], row["completion"]) for row in batch]
        completions = [sample(student, prompt, end_ids, args.max_completion_length) for prompt in student_prompts]
        loss = sdft_loss(student, teacher, student_prompts, teacher_prompts, completions)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        follow(teacher, student, args.ema_rate)
        print(f"step {step}/{args.steps}  loss {loss.item():.4f}  {tokenizer.decode(completions[0])!r}", flush=True)

    if args.output_dir:
        student.save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
