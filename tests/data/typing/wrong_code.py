"""What a checker has to report: an error in each line with a comment. Never run."""

import torch

import lm2_kernels as lm2

memory = lm2.initial_memory(2, 8, "identity")  # error
lm2.initial_memory(2, 8, 16, dtype="float32")  # error
lm2.memory_attention(memory, memory)  # error
lm2.memory_attention(memory, memory, memory, True)  # error
lm2.memory_attention(memory, memory, memory, mask=memory)  # error
lm2.memory_update(memory, memory, memory, memory, memory).mean()  # error

layer = lm2.PaperMemory(16, heads=4)  # error
lm2.ReleaseMemory("16")  # error
layer(memory)  # error
layer(memory, memory, offset=1)  # error
layer(memory, memory).sum()  # error
first, second, third = layer(memory, memory)  # error

model = lm2.LM2ForCausalLM({"vocab_size": 8})  # error
lm2.LM2Config(vocab_size=8)  # error
ids = torch.zeros(1, 4, dtype=torch.int64)
model(ids, memory=memory)  # error
model(ids).last_hidden_state.mean()  # error
model(ids).memory.detach()  # error
model.generate(ids, max_length=8)  # error
model.generate(ids).sequences.memory()  # error

state = lm2.MemoryState(4)  # error
state.reset([0])  # error
state.select(0)  # error
state.cpu()  # error
lm2.add_memory(layer, slots=8)  # error
lm2.add_memory(layer).parameter_groups()  # error
lm2.use_backend(None)  # error
lm2.forget_memory(layer)  # error
