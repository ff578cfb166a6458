"""What training logs: each metric by its name in TensorBoard.

The horizontal axis is environment steps, warm-up included. What an update computes is
logged every ``log_interval`` steps, as the update in that step found it on its batch:
one sample, not an average. Losses and other numbers are means over the batch, and those
"of a step" over the horizon too; ``grad_norm_*`` are global norms before clipping.
Terms whose coefficient is 0 are not logged, nor is what the policy imagines
(``imagined_*`` and ``lambda_return``) with ``actor_objective="qvalue"``.

Under *healthy* is what was seen while agents learned to run on HalfCheetah-v5: three
seeds of the quick preset (4,000 updates; returns 850, 2220 and 2370 in the end) and one
at the paper's settings in bf16 (15,000 updates; return 4270). Where it says *task*,
another task or another scale of the reward gives other numbers.

Signs of trouble, seen with ``kl_coef=0``, which learned nothing there:
``classifier_accuracy`` at 1, ``loss_classifier`` below 0.001 and ``imagined_log_ratio``
beyond +-10 say that latent model and encoder are apart; ``grad_norm_actor`` at 0 says
that all actions are stuck at their bounds. A ``pred_value`` that passes the largest
reward over ``1 - gamma`` says that the critics diverge.

Of every agent:

===========================  ===============================  ========  ================
name                         what it is                       unit      healthy
===========================  ===============================  ========  ================
train/return                 sum of the rewards of the        reward    rises; task
                             training episode that ended,
                             with action noise
train/length                 its length                       steps     task
eval/return                  mean return of an evaluation's   reward    rises; task
                             episodes, without action noise
eval/length                  their mean length                steps     task
optim_steps                  environment steps with updates,  updates   as many as
                             so far (REDQ makes 20 in each)             training steps
loss_qvalue                  squared TD error (Eq. 10); mean  reward^2  0.3 to 3.5; task
                             over ALM's critics, sum over
                             those of a baseline
grad_norm_qvalue             gradient of loss_qvalue          -         0.5 to 46; task
loss_actor                   what the actor minimises; ALM:   reward    falls as returns
                             minus the mean of gamma^t G_t              rise; task
                             (Eq. 8)
grad_norm_actor              gradient of loss_actor           -         0.6 to 17 while
                                                                        it learns; task;
                                                                        0: see above
===========================  ===============================  ========  ================

Of ALM:

===========================  ===============================  ========  ================
name                         what it is                       unit      healthy
===========================  ===============================  ========  ================
loss_model                   sum over K steps of kl less      -         140 to 910:
                             model_reward, less                         about K times
                             terminal_value (Eq. 7), with               kl; task
                             their weights
kl                           KL(m || e') of a step            nats      46 to 320,
                                                                        slowly rising;
                                                                        task
model_reward                 predicted reward of a step of    reward    mean reward in
                             the slice                                  the replay
terminal_value               min Q(z_K, pi(z_K))              reward    near pred_value
grad_norm_model              gradient of loss_model           -         100 to 12,500:
                                                                        mostly clipped;
                                                                        task
loss_reward                  squared error of the predicted   reward^2  under 0.02 after
                             reward (Eq. 11)                            3,000 updates;
                                                                        task
loss_classifier              cross entropy of real against    nats      0.4 to 0.65; 0:
                             imagined latents (Eq. 9);                  see above
                             chance is ln 2 = 0.69
classifier_accuracy          share of latents told right;     -         0.6 to 0.8; 1:
                             chance is 0.5                              see above
grad_norm_reward_classifier  gradient of the sum of both      -         0.8 to 6.3; task
                             losses
imagined_reward              predicted reward of an imagined  reward    task
                             step
imagined_log_ratio           log e'(z') / m(z'), as the       nats      -2 to 0.6; 10:
                             classifier says, before its                see above
                             weight
imagined_value               min Q of imagined states, with   reward    above pred_value
                             the entropy bonus
lambda_return                G_t, mean over the horizon       reward    near
                                                                        imagined_value
===========================  ===============================  ========  ================

Of variants of ALM:

===========================  ===============================  ========  ================
name                         what it is                       unit      healthy
===========================  ===============================  ========  ================
reconstruction               half the squared error of the    nats      falls; task
                             decoder, of a step; with
                             reconstruction_coef
value_prediction             squared TD error of the latent,  reward^2  near loss_qvalue
                             of a step; with
                             value_prediction
===========================  ===============================  ========  ================

Of some agents:

===========================  ===============================  ========  ================
name                         what it is                       unit      healthy
===========================  ===============================  ========  ================
pred_value                   Q of the batch, mean over the    reward    near
                             critics (not logged by SAC)                target_value
target_value                 its target: R + gamma times the  reward    under max R / (1
                             next value, R alone at a                   - gamma)
                             termination (not logged by SAC)
td_error                     abs(Q - target), mean; SAC: of   reward,   0.4 to 1.4
                             the worse critic; TD3: squared;  reward^2  (ALM); task
                             REDQ: not logged
next_state_value             TD3: smaller Q' of the next      reward    near pred_value
                             state
state_action_value_actor     TD3: Q of the actor's action,    reward    above pred_value
                             mean over the critics
log_prob                     SAC, REDQ: log pi(a|s), mean     nats      rises to minus
                                                                        the target
                                                                        entropy
entropy                      ALM with alpha_init: minus log   nats      above its
                             pi(a|z), mean                              target, - number
                                                                        of actions
alpha                        temperature of the entropy       reward    falls until the
                             bonus                            per nat   entropy is at
                                                                        its target
loss_alpha                   loss of the temperature: -       -         nears 0
                             alpha (log pi + target
                             entropy); SAC, REDQ: with log
                             alpha for alpha
grad_norm_alpha              gradient of loss_alpha           -         task
===========================  ===============================  ========  ================
"""
