#!/usr/bin/env bash
# The study of cifar10-jpeg.md: trains twelve small networks, probes and surveys them, and surveys untrained ones.
#
#   docs/studies/cifar10-jpeg.sh IMAGES        # a folder train/<class>/*.jpg, test/<class>/*.jpg named CIFAR10_JPEG
#
# About an hour and a half on two cores without a GPU. If it is stopped, the same command continues it.
set -euo pipefail

images=${1:?"a folder of images"}
off="--cka.every_n_epochs 0 --invariance.every_n_epochs 0 --probes.every_n_epochs 0 --neighbors.every_n_epochs 0
     --spectrum.every_n_epochs 0"
common="--config configs/image_folder.yaml --data.dataset $images --data.limit_train 10000 --data.val_fraction 0.02
        --data.measure_size 1024 --trainer.precision 32-true --loggers [csv] --resume auto $off"
supervised="--config configs/supervised_resnet18_cifar10.yaml $common --experiment survey"
simclr="--config configs/simclr_resnet18_cifar10.yaml $common --experiment survey --data.batch_size 256
        --model.optimizer sgd --model.lr 0.06 --model.weight_decay 5e-4 --model.warmup_epochs 2"

fit() { # NAME OPTIONS: unless it is finished
    grep -qs '"status": "finished"' runs/*/"$1"/run.json || python -m ssl_geometry.fit "${@:2}" --run_id "$1"
}

quarter="--model.width 0.25 --trainer.max_epochs 12"
fit supervised-s0 $supervised $quarter --seed_everything 0
fit supervised-s1 $supervised $quarter --seed_everything 1
fit supervised-simclr-views $supervised $quarter --model.views '[{augment: simclr}]'
fit supervised-short $supervised --model.width 0.25 --trainer.max_epochs 3
fit supervised-wide $supervised --model.width 0.5 --trainer.max_epochs 6
fit supervised-r10 $supervised --model.backbone resnet10 --model.width 0.25 --trainer.max_epochs 8
fit simclr-s0 $simclr $quarter --seed_everything 0
fit simclr-s1 $simclr $quarter --seed_everything 1
fit simclr-crop $simclr $quarter --model.views '[{augment: crop}]'
fit simclr-short $simclr --model.width 0.25 --trainer.max_epochs 3
fit simclr-wide $simclr --model.width 0.5 --trainer.max_epochs 6
fit simclr-r10 $simclr --model.backbone resnet10 --model.width 0.25 --trainer.max_epochs 8

# What transfers: classifiers on the frozen features, 10,000 images to learn from and 10,000 to test on.
models="supervised-s0 supervised-s1 supervised-simclr-views supervised-short supervised-wide supervised-r10
        simclr-s0 simclr-s1 simclr-crop simclr-short simclr-wide simclr-r10"
named=$(for name in $models; do echo "runs/survey/$name"; done)
untrained="untrained=random untrained-r10=random:resnet10@32"
[ -f runs/probe/cifar10-jpeg/tables.md ] ||
    python -m ssl_geometry.probe --models $named $untrained --evaluations [layers] --probes.layers pooled --out runs/probe/cifar10-jpeg

# The survey: manifolds of 1,024 test images, which networks are similar, and what predicts the probe; of some of the
# networks, then of all: measurements are kept, and only tables and figures are made again.
survey() { python -m ssl_geometry.survey --targets [runs/probe/cifar10-jpeg] --out runs/survey-cifar10-jpeg --models "$@"; }
for some in survey/s survey/supervised survey/simclr; do
    survey $(printf "%s\n" $named | grep "$some")
    cp runs/survey-cifar10-jpeg/tables/prediction.md "runs/prediction-${some//\//-}.md"
done
survey $named $untrained vit=random:vit_tiny_patch16_224@64

# What Grigg et al. 2021 found, on two seeds of each method and two untrained networks.
two() { echo "runs/survey/$1-s0,runs/survey/$1-s1"; }
[ -f runs/compare-cifar10-jpeg/findings.md ] ||
    python -m ssl_geometry.compare --models "simclr=$(two simclr)" "supervised=$(two supervised)" untrained=random:0,random:1 \
        --out runs/compare-cifar10-jpeg --overwrite

# Initialisation: ResNet-50 and ViT-S/16, three seeds each, on images enlarged to 96 pixels.
python -m ssl_geometry.survey --data.dataset "$images" --data.measure_size 1024 --neighbors.settings [] --neighbors.layers all \
    --models {resnet50-s0=random:resnet50@96:0,resnet50-s1=random:resnet50@96:1,resnet50-s2=random:resnet50@96:2} \
    {vit-s16-s0=random:vit_small_patch16_224@96:0,vit-s16-s1=random:vit_small_patch16_224@96:1,vit-s16-s2=random:vit_small_patch16_224@96:2} \
    --out runs/survey-initialisation

# And while they learn: a small ResNet and a small ViT.
watch="--spectrum.every_n_epochs 1 --spectrum.copies 0 --neighbors.every_n_epochs 1 --neighbors.settings []"
alone="--config configs/supervised_resnet18_cifar10.yaml $common --experiment collapse --trainer.max_epochs 6 $watch"
fit collapse-resnet $alone --model.width 0.25
fit collapse-vit $alone --model.backbone vit_tiny_patch16_224 --model.image_size 64 --model.optimizer adamw \
    --model.lr 1e-3 --model.warmup_epochs 1
python -m ssl_geometry.survey --models resnet=runs/collapse/collapse-resnet vit=runs/collapse/collapse-vit \
    --neighbors.settings [] --out runs/survey-collapse
