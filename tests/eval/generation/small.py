"""A transformer that trains in seconds."""

SMALL = {
    "resolution": 16,
    "width": 64,
    "depth": 1,
    "steps": 12,
    "batch_size": 16,
    "samples": 60,
    "sampling_steps": 4,
    "validation_images": 16,
    "validations": 4,
    "num_workers": 0,
    "images_at_a_time": 32,
}
