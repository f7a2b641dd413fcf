"""How many bytes a run takes on each GPU, from the models' configs alone; `python -m rlkd_trl.plan` prints it.

Nothing is downloaded but config.json, and nothing of a model's size is allocated. What is assumed:

- **Weights** are those of the model class, built with fake tensors; tied ones count once. Quantised, what bitsandbytes
  leaves alone (T5's `wo`, LM head, embeddings, norms) stays in the teacher's dtype; int8 adds 4 bytes per output
  row, nf4 4 bytes per block of 64 (no double quantisation).
- **Activations** are counted on the package's own forward and backward functions, run on fake tensors: every storage
  from its creation to its release. Attention is taken to be a fused kernel, as on GPUs. Every prompt and completion
  has its greatest length; padding makes shorter batches no smaller. Not counted: workspace inside of kernels, and a
  quantised teacher's own beyond the largest weight in 16 bits.
- **Optimizer**: AdamW, two moments in the weights' dtype; under DeepSpeed float32 moments and a float32 copy of the
  weights, split over the ranks.
- **Gradients**: DDP holds its communication buckets beside them, another copy (one rank has none). ZeRO-1 holds all,
  ZeRO-2 and 3 a rank's share; each adds the float32 share that a step needs, and DeepSpeed's reduce bucket, 5e8
  elements unless the configuration says otherwise.
- **ZeRO-3** gathers weights while it computes, at most `stage3_max_live_parameters`, 1e9 by default; the estimate
  takes that many. A student with fewer parameters is therefore whole during its update. While it samples it is whole
  on every rank, however many it has.
- The **reference** (beta > 0) and a separate critic are copies of the student. The reference is never sharded.
- Sampling, log-probabilities, scoring and update come one after another, so a rank's peak is what it always holds plus
  the largest of the four. RLOO and REINFORCE may need no pass for log-probabilities; it is counted. The **reserve** is
  for what is not counted: CUDA's context, kernels' workspace, fragmentation.
"""
