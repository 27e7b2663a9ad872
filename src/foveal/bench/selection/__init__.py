"""What methods that choose keys lose on a real model: `foveal bench --suite sparse`."""
