"""What a system or a policy does to a real model: quality, time and memory."""
