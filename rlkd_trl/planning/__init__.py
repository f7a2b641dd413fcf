"""Estimates what bytes, and what time, a run takes on each GPU, from the models' configs.

`python -m rlkd_trl.plan` prints it.

Only config.json is downloaded, and nothing of a model's size is allocated. The assumptions:

- **Weights** are those of the model class, built with fake tensors; tied weights count once. In a quantised teacher,
  what bitsandbytes does not convert (T5's `wo`, LM head, embeddings, norms) keeps the teacher's dtype; int8 adds 4
  bytes per output row, nf4 4 bytes per block of 64 (no double quantisation).
- **Activations** are counted while the package's own forward and backward passes run on fake tensors: every storage
  from its creation to its release. Attention is assumed to be a fused kernel, as on GPUs. Every prompt and completion
  has its greatest length. Not counted: the workspace inside kernels, and that of a quantised model beyond its
  largest weight before it was quantised.
- **Optimizer**: AdamW, two moments in the weights' dtype; under DeepSpeed float32 moments and a float32 copy of the
  weights, split over the ranks.
- **Gradients**: with DDP on several ranks, communication buckets are a second copy of them. ZeRO-1 holds all gradients
  on each rank, ZeRO-2 and 3 a rank's share; all three add the float32 share that a step needs, and DeepSpeed's reduce
  bucket, 5e8 elements unless the configuration says otherwise.
- **ZeRO-3** gathers weights while it computes, up to `stage3_max_live_parameters`, 1e9 by default; the estimate is for
  so many. A student with fewer parameters is therefore whole during its update. While it samples it is whole on every
  rank, whatever its size.
- The **reference** (beta > 0) and a separate critic are copies of the student. The reference is never sharded.
- **Adapters** are PEFT's, in float32; they alone have gradients and moments. The reference is the student with these
  off, and a separate critic copies the adapters alone, but under ZeRO-3 the weights beneath them too. Beneath
  adapters weights may be quantised, as in a teacher.
- **Recomputed layers** are computed again while the fake backward pass runs, and counted like everything else.
- Sampling, log-probabilities, scoring and update come one after another, so a rank's peak is what it always holds plus
  the largest of the four. Log-probabilities are a phase where there is a reference (beta > 0), a separate critic, or a
  student in 16 bits or with quantised weights; otherwise they come from sampling. RLOO and REINFORCE in 16 bits with
  one step for each rollout have no such phase, and are planned as if they had. The student's pass for `min_variance`
  with a lagging policy, and for `teacher_mix`, is not counted in float32.
  The **reserve** is for what is not counted: CUDA's context, kernels' workspace, fragmentation.
- **Time** (`--gpu_name`) is by the roofline: each operation of the same passes takes the longest of its arithmetic at
  the GPU's rate, its bytes at the memory's, and 10 µs for Python and the launch. A GPU reaches 60 % of its rated
  products, 80 % of its memory's rate and 70 % of its links'. These four figures are assumed, not measured. (On one CPU
  thread, with that machine's own rates, `recipes/benchmarks/planned_time.py` compares.) Sampling writes every token.
  What ranks send each other, in rings, and weights from CPU memory are not hidden behind computation; a teacher's nf4
  matrices are unpacked to 16 bits for every scoring batch, int8 ones are as fast as bfloat16. A rollout makes
  `--num_iterations` optimizer steps, each of all its micro-batches. Not counted: loading, evaluations, checkpoints, a
  separate critic's values of the rollout, the unpacking of a quantised student's weights, tokenization, rewards that
  run user code.
"""
