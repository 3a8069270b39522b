"""Models behind an API: OpenAI, Anthropic, DeepSeek, and every server that speaks one of their protocols."""
