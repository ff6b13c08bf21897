"""The method: every loss of ST-AR (arXiv 2509.15185), equation by equation.

    L = L_AR + alpha L_MIM + beta (L_step + L_view) / 2                                                (Eq. 8)

L_AR is next-token prediction. With L_MIM on, a random part of the student's keys is hidden (Eq. 3), whichever
loss then reads it, and its last layer is pulled towards that of an unmasked EMA teacher (Eq. 4); L_step and
L_view make a middle-layer feature tell its own image from the others of the batch, as seen from another step
(Eq. 6) or another view (Eq. 7) by the teacher. Nothing of this is left at sampling time.

Plain functions of tensors; they run on a CPU and need no process group. Every choice is tagged "paper:"
where the paper states it, "our choice:" where it leaves room. Where everything is:

    Eq. 2    losses.ar_loss            next-token prediction
    Eq. 3    losses.sample_key_mask    the hidden keys, which model.Transformer.forward applies
    Eq. 4    losses.mim_loss           student against teacher, last layer
    Eq. 5    losses.projector          z = f(h), at losses.sample_positions
    Eq. 6    losses.step_loss          InfoNCE between steps, through losses.info_nce
    Eq. 7    losses.view_loss          InfoNCE between views, through losses.info_nce
    Eq. 8    losses.total_loss         the sum
    Fig. 3   train.Objective.forward   how all of it plays together

Shapes in comments: B images on this process, B_all on all of them, V views of each, T tokens, codes (how
many there are), K positions, C width, S slots (see `info_nce`). A (B V) axis is image-major: row b V + m.
h (student) and h' (teacher) are the last block's features in Eq. 4, a middle block's in Eqs. 5 to 7.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

# ---- What is drawn at random in every step -----------------------------------------------------------------

def sample_key_mask(batch: int, num_tokens: int, ratio: float, generator: torch.Generator) -> torch.Tensor:
    """The sequence masks of Eq. 3: bool (batch, T), True where a key is hidden from all queries.

    paper: a random fraction r = 0.25 of the positions, one set for all queries.
    our choice: exactly round(r (T - 1)) of the positions 1 ... T - 1, anew in each step, in all heads and
    layers; the token's own query does not see it either. Position 0, the class, stays visible: it is the only
    key of the first query, whose row would else be empty.
    Raises ValueError unless 0 <= r < 1.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"the mask ratio must lie in [0, 1), not {ratio}.")
    # each row a random order of 0 ... T - 2
    shuffled = torch.rand(batch, num_tokens - 1, generator=generator, device=generator.device).argsort(1)
    masked = shuffled < round(ratio * (num_tokens - 1))
    return F.pad(masked, (1, 0))


def sample_positions(num_tokens: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """The K positions of Eq. 5, int64 (K,), distinct. paper: K = 4.

    our choice: from 1 ... T - 1, the same for the whole batch, anew in each step. Position 0 has seen the
    class alone, so that all images of a class would be the same there.
    Raises ValueError unless 1 <= K < T.
    """
    if not 1 <= count < num_tokens:
        raise ValueError(f"K = {count} positions cannot be drawn from the {num_tokens - 1} behind the class.")
    return torch.randperm(num_tokens - 1, generator=generator, device=generator.device)[:count] + 1


# ---- The losses --------------------------------------------------------------------------------------------

def ar_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Next-token prediction, nats; logits (B, T, codes) of positions 0 ... T - 1, tokens (B, T): x_1 ... x_T.

        L_AR = -1/T sum_t log p_theta(x_t | c, x_<t)                                                   (Eq. 2)
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())


def mim_loss(student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Masked image modelling in feature space; outputs of the last block, (B, T, C) each. In [0, 2].

        L_MIM = 1/T sum_t D(h_t, h'_t),   D(a, b) = 1 - a.b / (|a| |b|)                                (Eq. 4)

    h: student, keys masked; h', the target: teacher, nothing masked, detached here; both on the same tokens,
    at all positions: keys are missing, tokens are not. In float32, also under autocast.
    our choice: the raw block output, before the final norm.
    """
    return 1 - F.cosine_similarity(student.float(), target.float().detach(), dim=-1).mean()


def projector(dim: int) -> nn.Sequential:
    """f of Eq. 5, student only: an MLP of three linear layers, width C throughout.

    paper: an MLP of several layers, as in SimSiam.
    our choice: LayerNorm where SimSiam has BatchNorm, which would tie the processes together.
    """
    return nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim), nn.SiLU(),
                         nn.Linear(dim, dim), nn.LayerNorm(dim), nn.SiLU(), nn.Linear(dim, dim))


def info_nce(anchors: torch.Tensor, targets: torch.Tensor,
             temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """InfoNCE over slots; anchors (S, B, C), targets (S, B_all, C). Returns loss and accuracy in [0, 1].

    No gradient reaches the targets: they are detached here.

        -1/(S B) sum_s sum_b log  exp(a_sb . t_sb / tau) / sum_b' exp(a_sb . t_sb' / tau)

    A slot is one pairing of (view, position) with (view, position): in it only the image varies. The positive
    of anchor b is the target of the same image, in column b, as a process's own images come first (see
    `gather_images`); its negatives are the targets of all other images.
    our choice: features are L2-normalised, the temperature is ours to choose (the paper prints none);
    float32, also under autocast. The accuracy is the share of anchors closest to their positive.
    """
    a, t = F.normalize(anchors.float(), dim=-1), F.normalize(targets.float().detach(), dim=-1)
    with torch.autocast("cuda" if a.is_cuda else "cpu", enabled=False):  # in bfloat16 many would tie
        logits = (a @ t.mT / temperature).flatten(0, 1)  # (S B, B_all)
    positive = torch.arange(a.shape[1], device=a.device).repeat(len(a))  # (S B,)
    return F.cross_entropy(logits, positive), (logits.argmax(1) == positive).float().mean()


def ordered_pairs(count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """All i != j below `count`, i and j int64 (count (count - 1),) each; made on `device`: no copy."""
    i = torch.arange(count, device=device).repeat_interleave(count - 1)
    j = torch.arange(count - 1, device=device).repeat(count)
    return i, j + (j >= i)  # j skips i


def step_loss(z: torch.Tensor, target: torch.Tensor,
              temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Inter-step contrast; z = f(h) of the student (V, K, B, C), target = h' of the teacher (V, K, B_all, C).

        L_step = InfoNCE(z^(m,i), h'^(m,j)),   m a view, i != j two of the K positions                 (Eq. 6)

    Returns loss and accuracy. our choice: all K (K - 1) ordered pairs count. Raises ValueError unless K >= 2.
    """
    if z.shape[1] < 2:
        raise ValueError("the step loss needs at least two positions, K >= 2.")
    # i: the anchor's, j: its target's place among the K positions
    i, j = ordered_pairs(z.shape[1], z.device)
    anchors, targets = z[:, i].flatten(0, 1), target[:, j].flatten(0, 1)  # S = V K (K - 1) slots
    return info_nce(anchors, targets, temperature)


def view_loss(z: torch.Tensor, target: torch.Tensor,
              temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Inter-view contrast; z = f(h) of the student (V, K, B, C), target = h' of the teacher (V, K, B_all, C).

        L_view = InfoNCE(z^(i,k), h'^(j,k)),   i != j two views, k one of the K positions              (Eq. 7)

    Returns loss and accuracy. Raises ValueError unless V >= 2.
    """
    if z.shape[0] < 2:
        raise ValueError("the view loss needs at least two views, V >= 2.")
    # i: the anchor's, j: its target's view
    i, j = ordered_pairs(z.shape[0], z.device)
    anchors, targets = z[i].flatten(0, 1), target[j].flatten(0, 1)  # S = V (V - 1) K slots
    return info_nce(anchors, targets, temperature)


def total_loss(terms: dict[str, torch.Tensor], alpha: float, beta: float) -> torch.Tensor:
    """L = L_AR + alpha L_MIM + beta (L_step + L_view) / 2; an absent term is 0, the /2 stays (Eq. 8).

    `terms` holds "ar" and any of "mim", "step", "view". paper: alpha = 1, beta = 0.5.
    """
    contrast = terms.get("step", 0) + terms.get("view", 0)
    return terms["ar"] + alpha * terms.get("mim", 0) + beta * contrast / 2


def label_accuracy(classes: torch.Tensor) -> torch.Tensor:
    """InfoNCE accuracy of a model that only compares labels, in (0, 1]; classes (B_all,) as it saw them.

    Both anchor and target know the class, so that among the images of one class, m in the batch, a guess is
    right with chance 1 / m. Logged beside the contrastive accuracies: what exceeds it is not explained by the
    label.
    """
    return (1 / (classes[:, None] == classes).sum(1)).mean()


# ---- Between student and teacher, and between processes ----------------------------------------------------

@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """theta' <- m theta' + (1 - m) theta for all parameters, in float32, once per optimizer step."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - decay)


@torch.no_grad()
def gather_images(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Join x of all processes along its image axis `dim`, this one's images first: B -> B_all. No gradient.

    So the images of all processes are negatives. Without a process group the identity.
    """
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    rank = dist.get_rank()
    return torch.cat(parts[rank:] + parts[:rank], dim)
