"""The method, in plain PyTorch: score blocks, search what to give up, repair what is left, write checkpoints.

It knows neither queue, database, store nor service, and works from a notebook. Four rooms, none of which knows those
after it; `repair` and `serving` do not know each other. To be read in this order, each file after those it uses:

model/      the model as the method sees it
  building          one model is built at a time, since that patches torch for all threads
  configuration     configurations as transformers reads them, and those of pruned models
  blocks            where a model's blocks are; run one on a hidden state; drop some and renumber the rest
  plan              what a half gives up, and how; nesting; the KV layer map
  proof             before any work: pruned models of this architecture are what they should be
  parts             a block's attention and MLP: where they are, running it without one, what is zero then on disk
  units             what can be given up, one at a time: what a search chooses among
  sharing           weights that two models hold once
  calibration       text to fixed token windows
  cache             what a model's cache holds of a request
  measure           perplexity, likeness to the dense model, size, speed
  pair              a prefill and a decode checkpoint as one model: cache handover, the PD loss
  costs             operations, bytes of cache and of weights, and what each unit saves of them
  width             fewer MLP channels in every block
  speculation       what checkpoints bring for guessing tokens ahead, and pruned ones go without
  checkpoint        pruned checkpoints, sliced tensor by tensor out of the source's shards
  tensor_file       a safetensors file that is written tensor by tensor
  composite         vision-language models: their text decoder as a model of its own, and put back in its place
  sharding          a model over several devices
  streaming         a model read block by block from disk
  comparison        the figures of several models in one walk over their blocks
search/     what may go
  scores            how redundant each block is
  anchor            hidden states that are held, so that a walk can begin near where the last one went
  engine            the losses of many sets in one pass over the weights
  prefill_engine    the same for what prefill gives up and leaves keys and values of, beside a decode half
  memo              what is known of sets, window by window, and races between them
  ascent            which sets lie next to one another; going up the counts of removed blocks
  greedy            one unit more, count by count
  annealing         swaps of units that go and units that stay
  exhaustive        every set
  search            lets these go one after the other
  budget            units of any kind, until what is left costs no more than it may
  perplexity_bound  how many blocks a bound on perplexity lets go
repair/     making up for what went
  fold              without training: a linear map in the place of what went, folded into the MLP before it
  folded_sets       sets compared as they are with their gaps folded, without building them
  losses            what healing minimises
  answers           the same on answers alone, of windows that say which tokens are theirs
  answering         the dense model's own answers to prompts, to heal on
  optimiser         AdamW, of float32 or of bfloat16 weights with moments of 8 bits
  targets           what the dense model says of the windows, computed ahead and kept on disk
  training          the loop: warm-up, cosine, early stop, exact resuming
  distill           healing of prefill, then of decode on prefill's cache
  lora              low-rank adapters in place of all weights
  recompute         gradient checkpointing that holds for blocks that read and write a cache
  sharded           healing on several devices
  sharded_state     what is kept of that, to go on with on as many or others
serving/    a pair at work
  handover          what prefill sends for one request, as bytes
  pair_server       both halves, in one process or over a socket
  asking            a model, or a pair as it is served, is asked: how likely answers are, and what it says
  kv_tokens         which prompt tokens' keys and values decode needs
"""
