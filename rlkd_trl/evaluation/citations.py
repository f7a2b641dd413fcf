"""The papers that a model card cites."""

CITATIONS = {
    "teacher forcing": "Hao, Liu & Mou 2022. Teacher Forcing Recovers Reward Functions for Text Generation. NeurIPS.",
    "LLMR": "Li, Hao & Mou 2024. LLMR: Knowledge Distillation with a Large Language Model-Induced Reward. COLING.",
    "KETCHUP": (
        "Fan, Luo, Bowling & Mou 2026. KETCHUP: K-Step Return Estimation for Sequential Knowledge Distillation."
    ),
    "PPO": "Schulman et al. 2017. Proximal Policy Optimization Algorithms. arXiv:1707.06347.",
    "GAE": ("Schulman et al. 2016. High-Dimensional Continuous Control Using Generalized Advantage Estimation. ICLR."),
    "RLOO": (
        "Ahmadian et al. 2024. Back to Basics: Revisiting REINFORCE-Style Optimization for Learning from Human "
        "Feedback in LLMs. ACL."
    ),
    "MiniLLM": "Gu, Dong, Wei & Huang 2024. MiniLLM: Knowledge Distillation of Large Language Models. ICLR.",
    "distillation": "Hinton, Vinyals & Dean 2015. Distilling the Knowledge in a Neural Network. arXiv:1503.02531.",
    "sequences": "Kim & Rush 2016. Sequence-Level Knowledge Distillation. EMNLP.",
    "GKD": (
        "Agarwal et al. 2024. On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes. ICLR."
    ),
    "f-distill": "Wen, Li, Du & Mou 2023. f-Divergence Minimization for Sequence-Level Knowledge Distillation. ACL.",
    "DistiLLM": "Ko et al. 2024. DistiLLM: Towards Streamlined Distillation for Large Language Models. ICML.",
    "PKD": "Sun, Cheng, Gan & Liu 2019. Patient Knowledge Distillation for BERT Model Compression. EMNLP.",
    "DistilBERT": "Sanh, Debut, Chaumond & Wolf 2019. DistilBERT, a distilled version of BERT. arXiv:1910.01108.",
    "MiniLM": (
        "Wang et al. 2020. MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained "
        "Transformers. NeurIPS."
    ),
    "MiniLMv2": (
        "Wang, Bao, Huang, Dong & Wei 2021. MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing "
        "Pretrained Transformers. Findings of ACL."
    ),
    "TinyBERT": "Jiao et al. 2020. TinyBERT: Distilling BERT for Natural Language Understanding. Findings of EMNLP.",
    "MT-BERT": (
        "Wu, Wu & Huang 2021. One Teacher is Enough? Pre-trained Language Model Distillation from Multiple Teachers. "
        "Findings of ACL."
    ),
}
