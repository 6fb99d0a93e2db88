"""The engine: scheduler, denoising loop, worker process and the client that supervises it."""
