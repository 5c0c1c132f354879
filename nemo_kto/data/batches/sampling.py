"""Which samples form a global batch, in what order, and which response each prompt is paired with for the KL set.

Everything here depends on the data, the seed, the size of global batches, and that of the groups in which responses
are exchanged, only. The layout enters at the very end, where a rank takes its share of a global batch that is already
fixed (`dealing.py`).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np

from nemo_kto.data.batches.dealing import DocumentIndex
from nemo_kto.errors import DataError

Shuffle = bool | Literal["batches"]
"""True: every epoch deals the samples anew. "batches": every epoch deals the batches of the first one, and so the same
pairs, in an order of its own. False: the order of the data."""


Share = Callable[[list[DocumentIndex]], list[DocumentIndex]]
"""Takes a rank's documents of a global batch; see `Dealer.share`."""


def mismatch_permutation(prompt_keys: Sequence[int]) -> list[int]:
    """Deals the responses of a batch to other prompts: response `p[i]` joins prompt `i`.

    The KL term of KTO (arXiv 2402.01306) is estimated from prompts paired with responses that were given to
    other prompts. Every response is used exactly once, so the KL set has the same responses as the batch. The rule is
    the next sample, `p[i] = (i + 1) % n`. Where that is another response to the same prompt (data made from preference
    pairs puts the two side by side), it is exchanged with the nearest later one for which the exchange leaves neither
    prompt with a response of its own.

    The exchanges always reach the least possible number of meetings. Take a prompt that `m` of the `n` samples share,
    `c` of which meet a response of their own prompt. A partner for an exchange is any place whose prompt and
    response are both of other prompts; at most `2 * m - c` places are not, so one exists while `c > 2 * m - n`. And
    `2 * m - n` meetings cannot be avoided, because only `n - m` responses come from other prompts. For `n > 1`
    no sample keeps its own response: the first rule never does that, and an exchange only brings together different
    prompts.

    Args:
        prompt_keys: [n] a number per sample, equal for samples of the same prompt.

    Returns:
        A permutation of `range(n)`.
    """
    n = len(prompt_keys)
    partner = [(i + 1) % n for i in range(n)]
    meetings = Counter(prompt_keys[i] for i in range(n) if prompt_keys[partner[i]] == prompt_keys[i])
    unavoidable = {key: max(0, 2 * size - n) for key, size in Counter(prompt_keys).items()}
    for i in range(n):
        key = prompt_keys[i]
        if prompt_keys[partner[i]] != key or meetings[key] <= unavoidable[key]:
            continue
        j = (i + 1) % n
        while key in (prompt_keys[j], prompt_keys[partner[j]]):
            j = (j + 1) % n
        if prompt_keys[partner[j]] == prompt_keys[j]:
            meetings[prompt_keys[j]] -= 1
        partner[i], partner[j] = partner[j], partner[i]
        meetings[key] -= 1
    return partner


def previous_in_group(number: int, group_size: int) -> np.ndarray:
    """Deals the responses of each group of consecutive samples among themselves: response `p[i]` joins prompt `i`.

    It is the rule of TRL's KTOTrainer, whose groups are a device's micro-batches: the sample before, and for the first
    of a group its last. It does not look at prompts, so that pairs may be of one prompt; see `own_prompt_pairs`. The
    last group may be smaller; if it is a single sample, that keeps its own response.

    Args:
        number: Samples.
        group_size: Samples of a group.

    Returns:
        [number] int64, a permutation of `range(number)`.
    """
    places = np.arange(number)
    first = places - places % group_size
    sizes = np.minimum(number - first, group_size)
    partner: np.ndarray = first + (places - first - 1) % sizes
    return partner


def own_prompt_pairs(prompt_keys: np.ndarray, group_size: int) -> int:
    """Returns how many samples `previous_in_group` gives a response to their own prompt.

    Args:
        prompt_keys: [n] see `mismatch_permutation`, in the order in which the samples are dealt.
        group_size: Samples of a group.
    """
    return int((prompt_keys == prompt_keys[previous_in_group(len(prompt_keys), group_size)]).sum())


def epoch_length(num_samples: int, global_batch_size: int) -> int:
    """Whole global batches in one pass over the training data.

    Raises:
        DataError: There are fewer samples than one global batch needs.
    """
    if num_samples < global_batch_size:
        raise DataError(
            f"The training data has {num_samples} usable records, fewer than one global batch of {global_batch_size}; "
            "add data or lower global_batch_size."
        )
    return num_samples // global_batch_size


def kl_set_size(global_batch_size: int, kl_fraction: float) -> int:
    """Documents in the KL set of a global batch of the training data."""
    return max(1, round(kl_fraction * global_batch_size)) if kl_fraction else 0


class GlobalBatchSampler:
    """Deals one rank's share of every global batch of a run, epoch after epoch; a `batch_sampler` for DataLoader.

    What a step trains on is a function of (data, seed, step), so it is the same for every number of ranks and for a
    run that was resumed. What remains after the last whole batch of an epoch is left out of that epoch (with
    shuffling, other samples each time).
    """

    def __init__(
        self,
        prompt_keys: Sequence[int] | np.ndarray,
        *,
        global_batch_size: int,
        seed: int,
        shuffle: Shuffle,
        num_steps: int,
        steps_per_epoch: int | None = None,
        start_step: Callable[[], int] = int,
        kl_fraction: float = 1.0,
        kl_group_size: int | None = None,
        share: Share = list,
    ) -> None:
        """Checks the sizes; reads nothing yet.

        Args:
            prompt_keys: `TokenizedSample.prompt_key` of every sample of the data set.
            global_batch_size: Samples per step over all ranks.
            seed: Non-negative seed of the order.
            shuffle: See `Shuffle`.
            num_steps: Steps of the whole run.
            steps_per_epoch: Steps after which the next epoch begins; None for all whole batches of the data.
            start_step: Returns the number of steps taken before, where a resumed run goes on; asked when iteration
                starts.
            kl_fraction: Share of the samples whose prompts are paired with another's response; 0 for no KL set. Which
                ones is drawn from the seed and the batch's samples.
            kl_group_size: Responses are exchanged among so many consecutive samples, see `previous_in_group`; None:
                in the whole batch, see `mismatch_permutation`.
            share: Takes this rank's part; by default everything.

        Raises:
            DataError: Fewer samples than a global batch.
        """
        self._prompt_keys = np.asarray(prompt_keys, dtype=np.int64)
        self._global_batch_size = global_batch_size
        self._share = share
        self._seed = seed
        self._shuffle = shuffle
        self._num_steps = num_steps
        whole = epoch_length(len(prompt_keys), global_batch_size)
        self._steps_per_epoch = whole if steps_per_epoch is None else steps_per_epoch
        assert 0 < self._steps_per_epoch <= whole, (steps_per_epoch, whole)
        self._start_step = start_step
        self._kl_set_size = kl_set_size(global_batch_size, kl_fraction)
        self._kl_group_size = kl_group_size

    def __len__(self) -> int:
        """Steps of the whole run, whatever the position."""
        return self._num_steps

    def __iter__(self) -> Iterator[list[DocumentIndex]]:
        """Yields the rest of the run: from `start_step()` to its end."""
        order = np.empty(0, dtype=np.int64)
        ordered_epoch = None
        for step in range(self._start_step(), self._num_steps):
            epoch, step_in_epoch = divmod(step, self._steps_per_epoch)
            if epoch != ordered_epoch:
                order, ordered_epoch = self.epoch_order(epoch), epoch
            start = step_in_epoch * self._global_batch_size
            batch = order[start : start + self._global_batch_size]
            yield self._share(self._documents(batch))

    def _documents(self, batch: np.ndarray) -> list[DocumentIndex]:
        prompts = None
        if 0 < self._kl_set_size < len(batch):
            drawn = np.random.default_rng([self._seed, *batch.tolist()]).permutation(len(batch))
            prompts = np.sort(drawn[: self._kl_set_size]).tolist()
        keys, group_size = self._prompt_keys, self._kl_group_size
        return _documents_of(batch, keys, kl_set=self._kl_set_size > 0, group_size=group_size, prompts=prompts)

    def epoch_order(self, epoch: int) -> np.ndarray:
        """The samples in the order in which an epoch deals them."""
        num_samples = len(self._prompt_keys)
        if not self._shuffle:
            return np.arange(num_samples)
        dealt = 0 if self._shuffle == "batches" else epoch
        order = np.random.default_rng([self._seed, dealt]).permutation(num_samples)
        if epoch == dealt:
            return order
        size = self._global_batch_size
        batches = np.random.default_rng([self._seed, epoch]).permutation(self._steps_per_epoch)
        return order[: self._steps_per_epoch * size].reshape(-1, size)[batches].ravel()


class ValidationBatchSampler:
    """Deals one rank's share of batches that hold every sample exactly once, in the order of the data.

    `N` samples make `ceil(N / global_batch_size)` batches whose numbers of real samples differ by at most one (a last
    batch of a single sample would have no other prompt to pair with). With groups, which must stay whole, all batches
    are full but the last. Each is filled up to `global_batch_size` places with repeats of its first sample and pair at
    weight 0, so that every rank gets the same number.
    """

    def __init__(
        self,
        prompt_keys: Sequence[int] | np.ndarray,
        *,
        global_batch_size: int,
        kl_set: bool = True,
        kl_group_size: int | None = None,
        share: Share = list,
    ) -> None:
        """Reads nothing yet; the arguments are those of `GlobalBatchSampler`, `kl_set` says if there is one."""
        self._prompt_keys = np.asarray(prompt_keys, dtype=np.int64)
        self._global_batch_size = global_batch_size
        self._share = share
        self._kl_set = kl_set
        self._kl_group_size = kl_group_size

    def __len__(self) -> int:
        """Batches in one pass."""
        return -(-len(self._prompt_keys) // self._global_batch_size)

    def __iter__(self) -> Iterator[list[DocumentIndex]]:
        """Yields every batch of one pass."""
        for step in range(len(self)):
            yield self._share(self._filled(np.arange(self.num_samples(step), self.num_samples(step + 1))))

    def num_samples(self, batches: int) -> int:
        """Real samples in the first batches, 0 to all of them."""
        total = len(self._prompt_keys)
        if self._kl_group_size is None:
            return batches * total // len(self)
        return min(batches * self._global_batch_size, total)

    def _filled(self, samples: np.ndarray) -> list[DocumentIndex]:
        filled = []
        keys, group_size = self._prompt_keys, self._kl_group_size
        documents = _documents_of(samples, keys, kl_set=self._kl_set, group_size=group_size)
        for part in (documents[: len(samples)], documents[len(samples) :]):
            places = range(len(part), self._global_batch_size if part else 0)
            filled += part + [part[0]._replace(place=place, weight=0.0) for place in places]
        return filled


def _documents_of(
    samples: np.ndarray,
    prompt_keys: np.ndarray,
    *,
    kl_set: bool,
    group_size: int | None,
    prompts: Sequence[int] | None = None,
) -> list[DocumentIndex]:
    """The samples of a global batch, and of the pairs that are made of them those of `prompts` (None: all)."""
    numbers = samples.tolist()
    documents = [DocumentIndex(number, number, place) for place, number in enumerate(numbers)]
    if kl_set:
        if group_size is None:
            partner = mismatch_permutation(prompt_keys[samples].tolist())
        else:
            partner = previous_in_group(len(numbers), group_size).tolist()
        chosen = range(len(numbers)) if prompts is None else prompts
        documents += [DocumentIndex(numbers[i], numbers[partner[i]], p, True) for p, i in enumerate(chosen)]
    return documents
