# Semantic FPN labels the pixels of digits on photographs, in minutes on two cores: make quickstart-segmentation
# The published config with narrower heads, small images and a short schedule; expect a mIoU of about 83.
_base_ = "fpn_convmlp_s_512x512_40k_ade20k.py"

model = dict(
    data_preprocessor=dict(size=(128, 128)),
    backbone=dict(init_cfg=dict(checkpoint="output/quickstart_crops/best.pth")),
    neck=dict(out_channels=64),
    decode_head=dict(
        in_channels=[64, 64, 64, 64],
        channels=64,
        dropout_ratio=0.0,
        num_classes=11,
        loss_decode=dict(class_weight=[0.3] + [1.0] * 10),  # most pixels are background
    ),
)

# 128 px, and no flips: digits do not survive a mirror
train_pipeline = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSegInputs")]
test_pipeline = train_pipeline
train_dataloader = dict(batch_size=8, num_workers=1, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=8, num_workers=1, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

train_cfg = dict(max_iters=600, val_interval=300)
default_hooks = dict(checkpoint=dict(interval=300))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.05, by_epoch=False, begin=0, end=30),
    dict(type="PolyLR", power=0.9, eta_min=0.0, begin=30, end=600, by_epoch=False),
]
optim_wrapper = dict(optimizer=dict(lr=5e-4, weight_decay=0.05, fused=True), clip_grad=dict(max_norm=1.0))
channels_last = True
