"""Looking at attention: pictures of patterns, and how much softmax mass a pattern keeps."""
