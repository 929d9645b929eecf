"""A KV connector of vLLM for a prefill and a decode checkpoint of differing depth, and a plugin that skips dead parts.

Read in this order:

half        what a checkpoint's pdtrim.json says
identity    what both engines have to agree on, and what is said when they do not
handover    what prefill tells decode about a request, and which requests decode refuses
regions     which region of prefill's KV cache each layer of decode reads
lease       how long prefill keeps what decode reads
startup     what is checked before an engine serves
checkpoint  the pdtrim.json of a model that vLLM serves
engines     an engine of vLLM in these words
scheduler   which requests are pulled, refused, made to wait
worker      handshake, transfer, and the block that decode would overwrite
connector   the two, as vLLM loads them
sampling    what a request's sampling parameters say of its handover
first_token prefill's first token as a logits processor; `first_token_v2` is the same for vLLM's V2 model runner
loading     the plugin: a model that vLLM makes loses what its pdtrim.json says is given up
layers      decoder layers without their MLP, their attention, or all but their keys and values
keys_values what writes a KV cache without attention

The first six need no vLLM.
"""
