"""The interfaces of other libraries on foveal's engines: change an import, keep the code."""
