"""Mixture of Experts: where do tokens go, is that balanced, and what does it cost?

Everything here works on plain torch models and knows no trainer: ``families`` reads any supported
architecture through one table, ``monitor`` counts tokens per expert, ``balance`` computes the losses that keep
experts alive, ``plots`` draws both, ``parameters`` says where the weights are, ``experts_lora`` adapts experts at
low rank and ``adapter_files`` stores that as PEFT does; ``quant`` keeps frozen experts in four bits,
``shared_base`` trains experts over one dense feed-forward, ``peft_lora`` reads what the attention learned beside
them, and ``upcycle`` makes them of a dense model.
``docs/moe.md`` gives the reason behind each choice.
"""
