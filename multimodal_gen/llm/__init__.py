"""Language models: paged KV, prefix cache, scheduler, sampler, grammars, parsers, and the models themselves."""
